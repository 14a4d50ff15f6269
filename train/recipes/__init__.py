"""A bank behind the trainers that people have, one short file each: to run, or to copy from."""
