"""The command `strop`: one file per verb, imported only when used."""
