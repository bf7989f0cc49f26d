"""The laboratory: what the argument of the paper is made and measured with.

It imports the library, which never imports it. See nbs/lab."""
