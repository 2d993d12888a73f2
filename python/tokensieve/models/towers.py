"""Vision encoders whose blocks a method can act in: timm's ViT and DeiT, and the CLIP, SigLIP and DINOv2 towers of transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SUPPORTED = (
    "timm's VisionTransformer or VisionTransformerDistilled; CLIPVisionModel, SiglipVisionModel, Dinov2Model of transformers, or a CLIP, "
    "SigLIP or DINOv2 model around one"
)
BIASED = ("eager", "sdpa")  # attention of transformers that takes an additive mask; for others a block with a bias uses sdpa
Setter = Callable[[Any, str, Any], None]


class Attended(NamedTuple):
    """What the first half of a block computed."""

    tokens: Tensor  # (B, N, C), the attention added
    query: Tensor  # (B, H, N, D)
    key: Tensor
    scale: float


class Tower:
    """One encoder: its blocks, and how their halves are put together from the block's own submodules."""

    model: Any  # what the caller gave
    owner: Any  # the encoder itself, which no second sieve may hold
    blocks: list[Any]
    prefix: int  # tokens before the patches
    cls: bool
    no_mask: tuple[None, ...] = ()  # what a block's own forward takes beside the tokens
    mean: int | None  # first token of a mean over tokens that follows the encoder; None = no mean

    def attend(self, block: Any, x: Tensor, bias: Tensor | None) -> Attended:
        """Norm, attention and residual of a block; bias: (B, 1, 1, N) float32 added to the logits."""
        raise NotImplementedError

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        """The second half of a block."""
        raise NotImplementedError

    def checkpoints(self, block: Any) -> bool:
        """Whether the block's activations are recomputed in the backward pass."""
        raise NotImplementedError

    def install(self, run: Any, put: Setter) -> list[Any]:
        """Lets `run.encode` drive the blocks; put(module, name, value) sets an attribute until the end. Returns hooks."""
        raise NotImplementedError

    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of patches, where the model says it."""
        raise NotImplementedError

    def weights(self, block: Any) -> tuple[int, int, int]:
        """Weights of the attention's and the MLP's linear layers, and its width (heads times head size)."""
        attention, mlp = self.halves(block)
        sizes = [sum(m.weight.numel() for m in half.modules() if isinstance(m, nn.Linear)) for half in (attention, mlp)]
        return sizes[0], sizes[1], self.width(attention)

    def halves(self, block: Any) -> tuple[Any, Any]:
        """(attention, MLP) modules."""
        raise NotImplementedError

    def width(self, attention: Any) -> int:
        """Heads times head size."""
        raise NotImplementedError


class TimmTower(Tower):
    """timm.models.vision_transformer.VisionTransformer with plain blocks; DeiT's distilled one too."""

    def __init__(self, model: Any) -> None:
        self.model = self.owner = model
        self.blocks, self.prefix = list(model.blocks), model.num_prefix_tokens
        self.cls = model.cls_token is not None
        pooled = model.attn_pool is None and model.global_pool in ("avg", "avgmax")
        self.mean = (0 if model.pool_include_prefix else self.prefix) if pooled else None
        strange = {type(b).__name__ for b in self.blocks if type(b).__name__ != "Block"}
        strange |= {type(b.attn).__name__ for b in self.blocks if type(b).__name__ == "Block" and type(b.attn).__name__ != "Attention"}
        pool = model.attn_pool
        if pool is not None and (type(pool).__name__ != "AttentionPoolLatent" or pool.pos_embed is not None):
            strange.add(f"{type(pool).__name__} with one place for each patch")
        if type(model.patch_drop).__name__ == "PatchDropoutWithIndices":
            strange.add(type(model.patch_drop).__name__)
        if strange:
            raise TypeError(
                f"tokensieve.sieve: model must have timm's plain Block and Attention, got {type(model).__name__} with "
                f"{', '.join(sorted(strange))}"
            )

    def attend(self, block: Any, x: Tensor, bias: Tensor | None) -> Attended:
        attention, h = block.attn, block.norm1(x)
        B, N, _ = h.shape
        q, k, v = attention.qkv(h).reshape(B, N, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attention.q_norm(q), attention.k_norm(k)
        mask = None if bias is None else bias.to(q.dtype)
        if attention.fused_attn:
            dropout = attention.attn_drop.p if attention.training else 0.0
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            logits = (q * attention.scale) @ k.transpose(-2, -1)
            out = attention.attn_drop((logits if mask is None else logits + mask).softmax(dim=-1)) @ v
        out = out.transpose(1, 2).reshape(B, N, self.width(attention))
        norm, gate = getattr(attention, "norm", None), getattr(attention, "gate", None)  # newer than timm 1.0.0
        out = out if norm is None else norm(out)
        out = out if gate is None else out * gate(h).sigmoid()
        out = attention.proj_drop(attention.proj(out))
        return Attended(x + block.drop_path1(block.ls1(out)), q, k, attention.scale)

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        result: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return result

    def checkpoints(self, block: Any) -> bool:
        return bool(self.model.grad_checkpointing)

    def install(self, run: Any, put: Setter) -> list[Any]:
        model, pool = self.model, self.model.pool

        def forward_features(x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
            if attn_mask is not None or is_causal:
                raise ValueError(
                    "tokensieve.sieve: attn_mask and is_causal must be left out: the number of tokens changes from block to block"
                )
            x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
            result: Tensor = model.norm(run.encode(x))
            return result

        def pooled(x: Tensor, pool_type: str | None = None) -> Tensor:
            kind, start = model.global_pool if pool_type is None else pool_type, 0 if model.pool_include_prefix else self.prefix
            size = run.size_of(x)
            if size is None or (kind not in ("avg", "avgmax") and (model.attn_pool is None or not run.method.proportional)):
                result: Tensor = pool(x, pool_type)
                return result
            x, size = x[:, start:], size[:, start:]
            if model.attn_pool is not None:
                result = model.attn_pool(x, attn_mask=size.log()[:, None, None].to(x.dtype))
                return result
            mean = ((x.float() * size[..., None]).sum(1) / size.sum(1, keepdim=True)).to(x.dtype)
            return mean if kind == "avg" else 0.5 * (x.amax(dim=1) + mean)

        def refused(*_: Any, **__: Any) -> Any:
            raise NotImplementedError("tokensieve.sieve: intermediates have a different number of tokens in each block; see run.trace")

        put(model, "forward_features", forward_features)
        put(model, "pool", pooled)
        put(model, "forward_intermediates", refused)
        put(model, "get_intermediate_layers", refused)
        return []

    def grid(self) -> tuple[int, int] | None:
        size = getattr(self.model.patch_embed, "grid_size", None)
        return None if size is None else (int(size[0]), int(size[1]))

    def halves(self, block: Any) -> tuple[Any, Any]:
        return block.attn, block.mlp

    def width(self, attention: Any) -> int:
        return int(attention.num_heads * attention.head_dim)


class TransformersTower(Tower):
    """CLIPVisionModel, SiglipVisionModel or Dinov2Model of transformers."""

    no_mask = (None,)

    def __init__(self, model: Any, vision: Any, mean: int | None) -> None:
        self.model, self.owner, self.vision, self.mean = model, vision, vision, mean
        self.encoder = vision.encoder
        self.dino = hasattr(self.encoder, "layer")
        self.blocks = list(self.encoder.layer if self.dino else self.encoder.layers)
        self.cls = hasattr(vision.embeddings, "class_embedding") or hasattr(vision.embeddings, "cls_token")
        self.prefix = int(self.cls)

    def attend(self, block: Any, x: Tensor, bias: Tensor | None) -> Attended:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attention = block.attention if self.dino else block.self_attn
        h = block.norm1(x) if self.dino else block.layer_norm1(x)
        B, N, _ = h.shape
        shape = (B, N, -1, attention.head_dim)
        q, k, v = (project(h).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        scale, dropout = (attention.scaling, attention.attention_dropout) if self.dino else (attention.scale, attention.dropout)
        name = attention.config._attn_implementation
        mask = None if bias is None else bias.to(q.dtype)
        eager = sys.modules[type(attention).__module__].eager_attention_forward
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name if mask is None or name in BIASED else "sdpa", eager)
        dropout = dropout if attention.training else 0.0
        out, _ = function(attention, q, k, v, mask, scaling=scale, dropout=dropout, is_causal=False)
        out = (attention.o_proj if self.dino else attention.out_proj)(out.reshape(B, N, -1).contiguous())
        tokens = block.drop_path(block.layer_scale1(out)) + x if self.dino else x + out
        return Attended(tokens, q, k, scale)

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        if self.dino:
            result: Tensor = block.drop_path(block.layer_scale2(block.mlp(block.norm2(x)))) + x
        else:
            result = x + block.mlp(block.layer_norm2(x))
        return result

    def checkpoints(self, block: Any) -> bool:
        return bool(block.gradient_checkpointing)

    def install(self, run: Any, put: Setter) -> list[Any]:
        from transformers.modeling_outputs import BaseModelOutput
        from transformers.utils.output_capturing import capture_outputs

        config = self.vision.config

        def forward(encoder: Any, tokens: Any = None, attention_mask: Any = None, *, inputs_embeds: Any = None, **kwargs: Any) -> Any:
            if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
                raise ValueError("tokensieve.sieve: output_attentions must be off: the attention maps are not stored")
            if run.masked:
                raise ValueError("tokensieve.sieve: attention_mask must be left out: the number of tokens changes from block to block")
            return BaseModelOutput(last_hidden_state=run.encode(inputs_embeds if tokens is None else tokens))

        captured = capture_outputs(tie_last_hidden_states=False)(forward) if self.dino else forward
        put(self.encoder, "forward", captured.__get__(self.encoder))
        handles = [self.vision.register_forward_pre_hook(_mask_seen(run), with_kwargs=True)]
        if self.mean is not None:
            handles.append(self.vision.register_forward_hook(_weigh(run, self.mean)))
        if getattr(self.vision, "use_head", False):
            handles.append(self.vision.head.attention.register_forward_pre_hook(_bias_head(run), with_kwargs=True))
        return handles

    def grid(self) -> tuple[int, int] | None:
        config = self.vision.config
        size, patch = config.image_size, config.patch_size
        rows, columns = size if isinstance(size, (tuple, list)) else (size, size)
        high, wide = patch if isinstance(patch, (tuple, list)) else (patch, patch)
        return rows // high, columns // wide

    def halves(self, block: Any) -> tuple[Any, Any]:
        return (block.attention if self.dino else block.self_attn), block.mlp

    def width(self, attention: Any) -> int:
        return int(attention.q_proj.out_features)


def _mask_seen(run: Any) -> Any:
    """DINOv2 makes a mask by itself, for eager attention even of nothing: whether the caller gave one is seen here."""

    def before(_module: Any, _args: Any, kwargs: Any) -> None:
        run.masked = kwargs.get("attention_mask") is not None

    return before


def _weigh(run: Any, first: int) -> Any:
    """Scales the last hidden state so that the plain mean that follows is the mean weighted by size."""

    def after(_module: Any, _args: Any, output: Any) -> Any:
        x = output.last_hidden_state
        size = run.size_of(x)
        if size is not None:
            size = size[:, first:]
            share = size * (size.shape[1] / size.sum(1, keepdim=True))
            output.last_hidden_state = torch.cat([x[:, :first], x[:, first:] * share[..., None].to(x.dtype)], 1)
        return output

    return after


def _bias_head(run: Any) -> Any:
    """A token that stands for s patches counts s times in SigLIP's attention pooling, as it does in the blocks."""

    def before(head: Any, args: Any, kwargs: Any) -> Any:
        tokens = args[1]
        size = run.size_of(tokens) if run.method.proportional else None
        if size is None:
            return None
        bias = size.log()[:, None, None].expand(-1, head.num_heads, 1, -1).flatten(0, 1)
        return args, {**kwargs, "attn_mask": bias.to(tokens.dtype)}

    return before


def find_tower(model: Any) -> Tower:
    """The encoder of a supported model.

    Raises:
        TypeError: the model is not supported; the message names it and what is.
    """
    kinds = {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}  # by name: neither library is imported for this
    if "timm.models.vision_transformer.VisionTransformer" in kinds:
        return TimmTower(model)
    names = {kind.rsplit(".", 1)[1] for kind in kinds if kind.startswith("transformers.")}
    if names & {"CLIPVisionModel", "SiglipVisionModel", "Dinov2Model"}:
        return TransformersTower(model, model, None)
    if names & {"CLIPModel", "CLIPVisionModelWithProjection", "SiglipModel"}:
        return TransformersTower(model, model.vision_model, None)
    if names & {"CLIPForImageClassification", "SiglipForImageClassification"}:
        return TransformersTower(model, model.vision_model, int("CLIPForImageClassification" in names))
    if "Dinov2ForImageClassification" in names:
        return TransformersTower(model, model.dinov2, 1)
    inside = ""
    if hasattr(model, "_orig_mod"):
        inside = "; it is compiled: sieve the model itself, uncompiled, and compile inside the sieve"
    raise TypeError(f"tokensieve.sieve: model must be {SUPPORTED}, got {type(model).__name__}{inside}")
