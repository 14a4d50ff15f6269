"""The toy world's models: a random SigLIP, and a random Qwen2 with its own tokenizer."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SIZE = 64  # pixels per side: one tower input, so no resize blurs the shapes

END, PAD, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
TOKENIZER_SIZE = 400
SPARE_ROWS = 112  # more rows than tokens, as real checkpoints have
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def save_tower(folder: Path, seed: int) -> None:
    """Save a random SigLIP: 8x8 patches, so that stride 4 gives 2x2 cells and stride 8 one."""
    config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=SIZE // 8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = SiglipVisionModel(config)
        # Filters respond to a patch's colour more than to its texture. A strong constant (the biases)
        # keeps layer norm from amplifying grey patches; it is subtracted at layer -2, where all frames
        # would otherwise be almost equal. A linear probe then finds a cell's colours 99.5 % of the time.
        with torch.no_grad():
            filters = tower.embeddings.patch_embedding.weight  # (width, rgb, rows, columns)
            filters.mul_(0.1).add_(torch.randn(*filters.shape[:2], 1, 1) * 0.02)
            tower.embeddings.position_embedding.weight.add_(torch.randn(config.hidden_size) * 1.25)
            for layer in tower.encoder.layers:
                layer.mlp.fc1.bias.normal_(std=2.0)
            grey = tower(torch.zeros(1, 3, SIZE, SIZE), output_hidden_states=True)
            tower.encoder.layers[-2].mlp.fc2.bias.sub_(grey.hidden_states[-2].mean(dim=(0, 1)))
    tower.save_pretrained(folder)
    SiglipImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)


def save_llm(folder: Path, texts: Iterable[str], seed: int, tokens: int = TOKENIZER_SIZE) -> None:
    """Save a random Qwen2 and, beside it, a byte-level tokenizer trained on the texts.

    tokens: largest size of the tokenizer. It must have a token per word of the texts: with a token per
    letter so small a model never learns what a phrase means.

    The tokenizer is of Qwen2's own class, since that is what AutoTokenizer makes of any tokenizer
    found beside a Qwen2 model. Like every Qwen2 tokenizer it composes Unicode (NFC) first.
    """
    # Coordinates never reach the LLM as markup: they become tokens of their own or plain numbers.
    plain = [re.sub(r"<[txy]:([0-9.]+)>|<video>\n", r"\1", text) for text in texts]
    # often enough that each role becomes one token, as in real tokenizers
    roles = ["user\n", "assistant\n", "system\n"] * len(plain)
    tokenizer = Qwen2Tokenizer(pad_token=PAD).train_new_from_iterator(
        plain + roles, tokens, new_special_tokens=[START, END], show_progress=False
    )
    tokenizer.eos_token = END
    tokenizer.chat_template = CHAT_TEMPLATE
    config = Qwen2Config(
        vocab_size=tokens + SPARE_ROWS,
        initializer_range=0.09,  # 1 / sqrt(width): a narrow random model learns nothing for long at 0.02
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llm = Qwen2ForCausalLM(config)
    assert len(tokenizer) <= config.vocab_size
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
