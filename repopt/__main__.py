"""python -m repopt COMMAND …: the one door from the library to the laboratory"""
from repopt.lab.cli import main

if __name__ == "__main__": raise SystemExit(main())
