"""Runs the checks of processors and trainers with the real packages, which are fetched for it.

torchvision's published builds want CUDA's torch: in a process of their own, its compiled operators, which
nothing there calls, are only named (operators.py).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MATCHING = {"2.11": "0.26.0", "2.12": "0.27.1", "2.13": "0.28.0"}
"""torch -> the torchvision that belongs to it."""
SWIFT = """ms-swift==4.6.0 transformers==5.16.0 trl==0.29.0 peft==0.20.0 datasets==4.8.4
huggingface_hub==1.33.0 modelscope==1.40.2 modelscope_hub==0.5.1 qwen-vl-utils==0.0.14 addict==2.4.0
aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 attrdict==2.0.1 attrs==26.1.0 binpacking==2.0.1
cffi==2.1.1 cryptography==50.0.2 dacite==1.9.2 einops==0.8.2 frozenlist==1.8.0 httpcore==1.0.9
httpx==0.28.1
json_repair==0.64.6 multidict==7.2.1 propcache==0.5.4 pycparser==3.12 simplejson==4.3.0 sniffio==1.3.1
yarl==1.25.1"""
"""What ms-swift imports, as it pins it; the rest it takes from here."""
LMMS = """lmms-engine==0.1.4 transformers==5.8.1 tokenizers==0.22.2 huggingface_hub==1.33.0
deepspeed==0.19.8 antlr4-python3-runtime==4.9.3 attrs==26.1.0 audioread==3.1.0 cffi==2.1.1
cloudpickle==3.1.3 decorator==5.3.1 einops==0.8.2 gitdb==4.0.12 gitpython==3.2.1 hjson==3.1.0
httpcore==1.0.9 httpx==0.28.1 hydra-core==1.3.8 joblib==1.6.0 jsonlines==4.0.0 lazy_loader==0.6
librosa==0.11.0 llvmlite==0.50.0 loguru==0.7.3 msgpack==1.2.4 ninja==1.13.2 numba==0.68.1
omegaconf==2.4.0 opencv-python-headless==5.0.0.93 platformdirs==4.14.8 pooch==1.9.0
py-cpuinfo==9.0.0 pycparser==3.12 qwen-vl-utils==0.0.14 scipy==1.17.1 sentry-sdk==2.75.0
smmap==5.0.3 sniffio==1.3.1 soundfile==0.14.0 soxr==1.1.0 torchdata==0.11.0 wandb==0.27.2"""
"""What lmms-engine imports, by its own pins; deepspeed builds no kernels."""
PACKAGES = {
    "processor_checks.py": "",
    "frames_checks.py": "",
    "trainer_checks.py": "trl==1.16.0",
    "swift_checks.py": SWIFT,
    "lmms_checks.py": LMMS,
}
"""What each file of checks needs beside torchvision."""
APART = {"swift_checks.py": [["-k", "qwen2_vl"], ["-k", "qwen2_5_vl"], ["-k", "not qwen2"]]}
"""Checks that need a process each: ms-swift keeps a plug-in for as long as its process lives."""


@pytest.mark.slow
@pytest.mark.registry
@pytest.mark.parametrize("checks", PACKAGES)
def test_with_the_real_packages(checks: str, tmp_path: Path) -> None:
    version = MATCHING.get(".".join(torch.__version__.split(".")[:2]))
    if version is None:
        pytest.skip(f"which torchvision belongs to torch {torch.__version__} is not known here")
    place = tmp_path / "packages"
    flags = ["--quiet", "--no-deps", "--disable-pip-version-check", "--target", str(place)]
    wanted = [f"torchvision=={version}", *PACKAGES[checks].split()]
    pip = [sys.executable, "-m", "pip", "install", *flags, *wanted]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip("no package registry, or none with these packages")
    paths = [str(place), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    flags = ["-q", "-p", "no:cacheprovider", "-p", "tests.train.bank_vlm.operators"]
    file = str(Path(__file__).with_name(checks))
    for chosen in APART.get(checks, [[]]):
        run = [sys.executable, "-m", "pytest", *flags, *chosen, file]
        done = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:]
        assert re.search(r"\d+ passed", done.stdout), done.stdout
        assert "skipped" not in done.stdout
