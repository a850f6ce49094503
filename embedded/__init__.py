"""The recipe of the embedded tiny model: its text, its vocabulary and its weights, all made here from a seed."""
