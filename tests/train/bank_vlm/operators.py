"""A pytest plug-in that names torchvision's compiled operators, so that its Python part is imported."""

import importlib.util
import re
from pathlib import Path

import torch

found = importlib.util.find_spec("torchvision")
assert found
assert found.origin
text = (Path(found.origin).parent / "_meta_registrations.py").read_text()
library = torch.library.Library("torchvision", "DEF")
for one, other in sorted(set(re.findall(r'register_meta\("(\w+)"|torchvision::(\w+)', text))):
    library.define(f"{one or other}(Tensor x) -> Tensor")
