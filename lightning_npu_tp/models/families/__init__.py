"""The model families that are supported, one file each: a plan, sizes and constructors."""
