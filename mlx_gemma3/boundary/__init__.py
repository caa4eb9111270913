"""Where values come in from outside and files are read and written: what every room above needs for that."""
