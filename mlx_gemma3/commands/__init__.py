"""The commands, a file each: parse, call one function, print. cli.py puts them together."""
