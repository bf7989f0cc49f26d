"""python tied.py COMMAND …: COMMAND in this process's place, ended by Linux when the process that started it ends.

`make`, Snakemake, papermill, a notebook's kernel and its workers stand in a row; whichever of them is killed,
none behind it goes on.
"""
import ctypes
import os
import signal
import sys

ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))                             # PR_SET_PDEATHSIG; it outlasts exec
os.execvp(sys.argv[1], sys.argv[1:])
