#!/usr/bin/env python3
"""Compare logits with Hugging Face's BitNetForCausalLM or LlamaForCausalLM.

    compare_logits.py HF_DIR OURS.npy IDS.txt [--json]

HF_DIR     a checkpoint that `AutoModelForCausalLM.from_pretrained` loads
OURS.npy   float32 [tokens, vocab], as `bitnet logits --tokens ... -o OURS.npy` writes it
IDS.txt    the token ids, separated by commas or white space

Prints the mean KL(HF64 || ours) in nats per position, the floor KL(HF64 || HF32), their ratio and the share of positions with
the same most likely token. HF64 and HF32 are the same implementation with the model in float64 and float32. Rounding alone moves
the logits of a BitNet (an activation on x.5 flips an int8 code), so a result is judged against that floor: a ratio up to 2 is good.

Needs torch, transformers (5.x), accelerate, numpy.

What HF64 and HF32 are
----------------------
HF32 is Hugging Face's code as it is, with the model in float32.

HF64 is the same code with the model in float64, and with the casts to float32 lifted that it contains whatever the dtype of the model:
in WeightQuant and ActQuant (mean or maximum, scale, product, rounding to codes, dequantised value) and in RMSNorm (all but the product
with its weight). Left as they are, the reference would decide its codes with float32 noise of its own, partly the same as in HF32.
Only the RoPE angles, sines and cosines stay float32: they are tables that HF computes so. Attention is `sdpa`, which keeps the
softmax in the dtype of the model (`eager` would take it in float32).
"""

import argparse
import contextlib
import json
import os
import re
import sys

# The quantisation functions are decorated with torch.compile; the plain operators are the definition and need no C++ compiler.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch


def load(directory, dtype):
    """The model of `directory` in `dtype`, with ternary weights and int8 activations known to be active."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
    assert all(p.dtype == dtype for p in model.parameters()), "a parameter was left in another dtype"
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            assert isinstance(module, (AutoBitLinear, BitLinear)), f"{name} is {type(module).__name__}: no BitLinear is active"
    assert type(model.lm_head) is torch.nn.Linear, "the head must not be quantised"
    return model


@contextlib.contextmanager
def float64_throughout():
    """Hugging Face's functions that cast to float32, without the cast. Same operators in the same order."""
    from transformers.integrations.bitnet import ActQuant, WeightQuant
    from transformers.models.bitnet.modeling_bitnet import BitNetRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def weight_quant(ctx, weight):
        scale = 1.0 / weight.abs().mean().clamp_(min=1e-5)
        return (weight * scale).round().clamp(-1, 1) / scale

    def act_quant(ctx, activation):
        scale = 127 / activation.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
        return (activation * scale).round().clamp(-128, 127) / scale

    def rms_norm(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    patches = [(WeightQuant, staticmethod(weight_quant)), (ActQuant, staticmethod(act_quant)), (BitNetRMSNorm, rms_norm), (LlamaRMSNorm, rms_norm)]
    originals = [(cls, cls.__dict__["forward"]) for cls, _ in patches]
    for cls, forward in patches:
        cls.forward = forward
    try:
        yield
    finally:
        for cls, forward in originals:
            cls.forward = forward


def logits_of(model, ids):
    with torch.no_grad(), float64_throughout() if model.dtype == torch.float64 else contextlib.nullcontext():
        out = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return out.to(torch.float64)


def divergence(reference, other):
    """KL(reference || other) per position, in nats, and where both have the same first token."""
    p, q = torch.log_softmax(reference, -1), torch.log_softmax(other, -1)
    return (p.exp() * (p - q)).sum(-1), reference.argmax(-1) == other.argmax(-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_dir")
    parser.add_argument("ours")
    parser.add_argument("ids")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    ids = [int(t) for t in re.split(r"[,\s]+", open(args.ids).read().strip())]
    ours = np.load(args.ours)
    if ours.ndim != 2 or ours.shape[0] != len(ids):
        sys.exit(f"{args.ours}: shape {ours.shape}, expected [{len(ids)}, vocab]")
    ours = torch.from_numpy(ours.astype(np.float64))

    hf64 = logits_of(load(args.hf_dir, torch.float64), ids)
    hf32 = logits_of(load(args.hf_dir, torch.float32), ids)
    if ours.shape != hf64.shape:
        sys.exit(f"{args.ours}: shape {tuple(ours.shape)}, the model gives {tuple(hf64.shape)}")
    kl, top1 = divergence(hf64, ours)
    floor, floor_top1 = divergence(hf64, hf32)
    result = {
        "positions": len(ids),
        "kl_hf64_ours": kl.mean().item(),
        "kl_hf64_hf32": floor.mean().item(),
        "ratio": kl.mean().item() / max(floor.mean().item(), 1e-300),
        "top1_ours": top1.double().mean().item(),
        "top1_hf32": floor_top1.double().mean().item(),
        "worst_position": kl.argmax().item(),
        "worst_kl": kl.max().item(),
    }
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:16} {value:.6g}")


if __name__ == "__main__":
    main()
