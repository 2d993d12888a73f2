"""The model that the demo prunes: a local checkpoint, or the real LLaVA architecture, small and with random weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import DemoError
from .photo import centre_square, clip_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, PATCH = 336, 14  # CLIP-L/14-336: 24 x 24 = 576 patches, as in LLaVA-1.5
VOCABULARY, IMAGE_TOKEN = 32064, 32000
SYSTEM, QUESTION = 35, 29  # tokens around the image in LLaVA-1.5's prompt: 640 in all


@dataclass
class Subject:
    """A model, one prompt with one photo, and what to say about them."""

    model: Any
    inputs: dict[str, Any]
    description: str
    random: bool
    processor: Any = None

    @property
    def text(self) -> Any:
        """The decoder's configuration."""
        return self.model.config.get_text_config()

    @property
    def image_tokens(self) -> int:
        return int((self.inputs["input_ids"] == self.model.config.image_token_id).sum())

    @property
    def length(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


def random_llava(photo: Image, seed: int, layers: int, hidden: int) -> Subject:
    """LLaVA-1.5 as transformers builds it, with real token counts and depth but narrow and untrained."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    if hidden % 64:
        raise DemoError(f"--hidden must be a multiple of 64 (head sizes), got {hidden}")
    head = 128 if hidden % 128 == 0 else 64  # 128 as in LLaVA-1.5-7B
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,  # 11008 / 4096, Llama's ratio
        num_hidden_layers=layers,
        num_attention_heads=hidden // head,
        num_key_value_heads=hidden // head,
        max_position_embeddings=4096,
    )
    vision = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,  # head size 64 as in CLIP-L
        projection_dim=256,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=(SIDE // PATCH) ** 2)
    generator = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration._from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
        words = torch.randint(3, 32000, (1, SYSTEM + QUESTION))
    finally:
        torch.random.set_rng_state(generator)
    image = torch.full((1, config.image_seq_length), IMAGE_TOKEN)
    ids = torch.cat([words[:, :SYSTEM], image, words[:, SYSTEM:]], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": clip_pixels(centre_square(photo, SIDE)),
    }
    words_for = f"LLaVA-1.5 architecture at reduced size ({layers} layers, width {hidden}, random weights, seed {seed})"
    return Subject(model, inputs, words_for, random=True)


def checkpoint(path: Path, photo: Image, prompt: str) -> Subject:
    """A checkpoint folder on this machine; nothing is downloaded.

    Raises:
        DemoError: no such folder, or transformers can't load it.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    if not (path / "config.json").is_file():
        raise DemoError(f"--model {path}: not a checkpoint folder (no config.json in it)")
    logging.disable_progress_bar()  # the demo shows its own
    logging.set_verbosity_error()
    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        model, loading = AutoModelForImageTextToText.from_pretrained(path, local_files_only=True, dtype="auto", output_loading_info=True)
    except Exception as error:  # broken files raise whatever their parser does: SafetensorError is no OSError
        raise DemoError(f"--model {path}: transformers can't load it ({_first_line(error)})") from None
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers
        raise DemoError(f"--model {path}: the checkpoint lacks {len(missing)} of the model's weights, {missing[0]} for one")
    model = model.eval()
    if torch.cuda.is_available():
        model = model.cuda()
    try:
        inputs = processor(images=photo, text=_prompt(processor, prompt), return_tensors="pt").to(model.device)
    except ValueError as error:  # as for a prompt with an <image> of its own
        raise DemoError(f"--prompt {prompt!r}: the processor of {path.name} refuses it ({_first_line(error)})") from None
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    token = getattr(model.config, "image_token_id", None)
    if token is not None and not (inputs["input_ids"] == token).any():
        raise DemoError(f"--model {path}: its processor puts no image token (id {token}) into the prompt")
    return Subject(model, dict(inputs), f"{path.name} ({type(model).__name__})", random=False, processor=processor)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _prompt(processor: Any, question: str) -> str:
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    return f"USER: <image>\n{question} ASSISTANT:"
