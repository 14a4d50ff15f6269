"""A bank in the place of the vision tower of transformers' own video models, for any trainer of them."""
