#!/usr/bin/env python3
"""Write the reference fixtures of crates/bitnet/tests/fixtures/models with Hugging Face's BitNetForCausalLM and LlamaForCausalLM.

    python tools/make_goldens.py --demo DEMO_MODEL_DIR --out crates/bitnet/tests/fixtures/models

One folder a model: `demo` (the trained demo model, whose weights stay where they are) and small random models, which this script
creates as HF checkpoints (config.json, model.safetensors with bf16 master weights, no tokenizer), the input of `bitnet convert`:

    gqa      relu2, 4 heads of 32, 2 key-value heads, tied head; rows of 128
    silu     SiLU, 4 heads of 16, 2 key-value heads, tied head; rows of 64 and 128
    mha      relu2, as many key-value heads as heads (2 of 32), a head of its own (tie_word_embeddings false); rows of 64 and 128
    ragged   relu2, 2 heads of 40, 1 key-value head, tied head; rows of 80 and 176, which straddle the 128-weight blocks of I2_S
    llama    LlamaForCausalLM with packed weights and scales to divide by (BitLinear, as Llama3-8B-1.58 and Falcon3): 4 heads of 16,
             2 key-value heads, RoPE scaled as in Llama 3.1, a head of its own; the first layer traced
    falcon   LlamaForCausalLM with master weights (as Falcon-E before it is packed): 4 heads of 16, 1 key-value head, tied head

Models of LlamaForCausalLM have no attn_sub_norm and ffn_sub_norm; the codes are those of attn and act then.

compare_logits.py says what HF64 and HF32 are.

The floor
---------
HF32 and every other float32 implementation flip int8 codes that lie on x.5, and one flip moves the logits of all later positions. On one
sequence of a small model their number is a matter of luck. So the floor is the mean of KL(HF64 || HF32) over 8 evaluations of HF32 with
the hidden and feed-forward features in another order, which changes nothing but the order of the sums. The seeds of the small models
are such that the floor is steady over these orders, and that no code is on x.5 exactly (there even float64 implementations differ;
without sub-norms the attention of position 0 is a row of integers times a factor, where that happens to most seeds).

golden.safetensors (T positions, H hidden, F feed-forward, Q = heads * head_dim, K = kv heads * head_dim, V vocabulary)
---------------------------------------------------------------------------------------------------------------------
End to end. The whole distribution of HF64 at every position is E * hidden64[t] in float64, with E the bf16 head (`lm_head.weight`,
or `model.embed_tokens.weight` where tied; f16 holds the demo model's E to 3e-8). That is 1/16 of the size of the logits and exact to 1e-7:

    ids                 I32 [T]
    hidden64            F32 [T, H]   output of the final norm in HF64, rounded once
    check.positions     I32 [C]
    check.logits64      F32 [C, V]   HF64 logits at those positions, rounded once: to check E * hidden64

Layer by layer, all from HF in float32 (N traced positions, each < S; layers: `trace.layers`). Names start with `L<layer>.`:

    trace.layers        I32 [..]
    trace.positions     I32 [N]
    x                   F32 [N, H]   input of the block (of layer 0: the embedding rows) = input of attn_norm
    attn_norm           F32 [N, H]   its output = input of q, k, v
    q                   F32 [N, Q]   BitLinear outputs, before RoPE; k and v for all positions 0..S
    k, v                F32 [S, K]
    q_rope, k_rope      F32 [N, Q], [N, K]   after RoPE, at the traced positions
    attn                F32 [N, Q]   attention output = input of attn_sub_norm; row n attends to positions 0..=positions[n]
    attn_sub_norm       F32 [N, Q]   = input of o
    o                   F32 [N, H]
    x_mid               F32 [N, H]   x + o = input of ffn_norm
    ffn_norm            F32 [N, H]   = input of gate, up
    gate, up            F32 [N, F]
    act                 F32 [N, F]   act(gate) * up = input of ffn_sub_norm
    ffn_sub_norm        F32 [N, F]   = input of down
    down                F32 [N, H]
    <norm>.codes        I8, shape of <norm>    int8 codes of the norm's output, for <norm> = attn_norm, attn_sub_norm, ffn_norm, ffn_sub_norm
    <norm>.scale        F32 [N]                their scale s: code = round(x * s)
  and without a layer:
    final.x, final.norm F32 [N, H]   input and output of the final norm
    final.logits        F32 [N, V]   (demo: the first 4 traced positions only)
    rope.positions      I32 [R]
    rope.cos, rope.sin  F32 [R, head_dim / 2]

golden.json: `floor` (mean KL(HF64 || HF32) over the orders, in full precision), `kl_hf64_hf32` (one value an order, the first as stored),
`top1_hf64_hf32` (likewise), the shape of the model, and for each ternary weight its shape, sha256 over the trits (int8 -1/0/1,
row-major) and the scale that HF32 multiplies them with (mean|W|; torch's order of summation leaves it 1 or 2 ulp from the exact mean).

How HF32 quantises (integrations/bitnet.py), in float32 whatever the dtype of the model
    weight:      s = 1 / max(mean|W|, 1e-5);       trit = clamp(round_half_even(W * s), -1, 1);      used value = trit / s
    activation:  s = (1 / max(max|x|, 1e-5)) * 127 (torch writes 127 / t as reciprocal, then product: two roundings);
                 code = clamp(round_half_even(x * s), -128, 127);                                   used value = code / s
A test compares floats relative to the largest magnitude of the row: where a sum cancels to nearly 0, the order of summation is all that
is left of it (HF32 sums products of dequantised floats, an integer kernel sums exactly). Read so, a plain float32 implementation is
within 1e-6, and RoPE with exact angles within 4e-6, as HF's float32 angles are up to 2e-5 off at position 511.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

from compare_logits import divergence, load, logits_of  # first: it sets the environment of torch

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.bitnet import ActQuant, BitLinear, WeightQuant, pack_weights, unpack_weights
from transformers.models.bitnet.modeling_bitnet import apply_rotary_pos_emb

POSITIONS = 512
ORDERS = 8
TRACE_POSITIONS = [0, 1, 7, 23, 40, 63, 64, 71]
ROPE_POSITIONS = [0, 1, 7, 71, 255, 511]
CHECK_POSITIONS = [0, 100, 255, 511]

SMALL = {
    # name: seed and configuration
    "gqa": (12, dict(num_hidden_layers=3, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128)),
    "silu": (3, dict(num_hidden_layers=6, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, hidden_act="silu")),
    "mha": (11, dict(num_hidden_layers=6, hidden_size=64, num_attention_heads=2, num_key_value_heads=2, intermediate_size=128, tie_word_embeddings=False)),
    "ragged": (12, dict(num_hidden_layers=5, hidden_size=80, num_attention_heads=2, num_key_value_heads=1, intermediate_size=176)),
}

# The same for LlamaForCausalLM, with the quantisation_config.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
LLAMA = {
    "llama": (7, dict(num_hidden_layers=6, num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=LLAMA3), {}),
    "falcon": (31, dict(num_hidden_layers=4, num_key_value_heads=1, tie_word_embeddings=True,
                       rope_parameters={"rope_type": "default", "rope_theta": 1000042.0}),
               {"linear_class": "autobitlinear", "quantization_mode": "online"}),
}


def make_llama(name, directory):
    """A random checkpoint of LlamaForCausalLM in bf16; packed, unless it is quantised on load."""
    seed, shape, quantization = LLAMA[name]
    config = LlamaConfig(vocab_size=128, hidden_size=64, num_attention_heads=4, intermediate_size=128, max_position_embeddings=1024,
                         rms_norm_eps=1e-5, bos_token_id=126, eos_token_id=127, pad_token_id=None, **shape)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for parameter_name, p in LlamaForCausalLM(config).named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 1:
            w = 1 + 0.1 * noise
        elif "embed" in parameter_name or "lm_head" in parameter_name:
            w = 0.15 * noise
        else:
            # without sub-norms only large weights make layers that matter
            w = (0.1 + 0.15 * torch.rand((), generator=generator)) * noise
        w = w.to(torch.bfloat16)
        if parameter_name.endswith("_proj.weight") and "quantization_mode" not in quantization:
            s = 1.0 / w.float().abs().mean()
            tensors[parameter_name + "_scale"] = s.to(torch.bfloat16)[None]
            w = pack_weights((w.float() * s).round().clamp(-1, 1))
        tensors[parameter_name] = w.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    written = config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                                       "quantization_config": {"quant_method": "bitnet", **quantization}}
    written.pop("transformers_version", None)
    (directory / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def make_small(name, directory):
    """A random checkpoint in HF's format, bf16, with quantisation on load."""
    seed, shape = SMALL[name]
    shape = {"hidden_act": "relu2", "tie_word_embeddings": True, **shape}
    config = BitNetConfig(
        vocab_size=256, max_position_embeddings=1024, rms_norm_eps=1e-5,
        bos_token_id=254, eos_token_id=255, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **shape,
    )
    model = BitNetForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                p.copy_(1 + 0.1 * noise)
            elif "embed" in parameter_name or "lm_head" in parameter_name:
                p.copy_(0.15 * noise)
            else:
                # a scale of its own for each tensor
                p.copy_((0.02 + 0.03 * torch.rand((), generator=generator)) * noise)
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    path = directory / "config.json"
    written = json.loads(path.read_text())
    written.pop("transformers_version", None)
    written["quantization_config"] = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def reorder(model, seed):
    """Permutes the hidden and the feed-forward features of the model in place: the same function, its sums in another order."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(model.config.hidden_size, generator=generator)
    feed_forward = torch.randperm(model.config.intermediate_size, generator=generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            part = name.split(".")[-2]
            if part in ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj"):
                p.copy_(p[:, hidden])
            elif part in ("gate_proj", "up_proj"):
                p.copy_(p[feed_forward][:, hidden])
            elif part == "o_proj":
                p.copy_(p[hidden])
            elif part == "down_proj":
                p.copy_(p[hidden][:, feed_forward])
            elif part == "ffn_sub_norm":
                p.copy_(p[feed_forward])
            elif part != "attn_sub_norm":
                p.copy_(p[hidden])
        for name, module in model.named_modules():
            if isinstance(module, BitLinear):
                part, w = name.split(".")[-1], unpack_weights(module.weight, torch.float32)
                rows = {"gate_proj": feed_forward, "up_proj": feed_forward, "o_proj": hidden, "down_proj": hidden}.get(part, slice(None))
                columns = {"o_proj": slice(None), "down_proj": feed_forward}.get(part, hidden)
                module.weight.copy_(pack_weights(w[rows][:, columns]))


def ternary_weights(model):
    """Trits and scale of every BitLinear as HF computes them; checked against what its forward pass uses."""
    result = {}
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        if isinstance(module, BitLinear):
            trits, s = unpack_weights(module.weight, torch.float32), module.weight_scale
        else:
            w = module.weight.detach().float()
            s = 1.0 / w.abs().mean().clamp(min=1e-5)
            trits = (w * s).round().clamp(-1, 1)
            assert torch.equal(trits / s, WeightQuant.apply(module.weight.detach()).float()), name
        result[name + ".weight"] = {
            "shape": list(trits.shape),
            "sha256": hashlib.sha256(trits.to(torch.int8).contiguous().numpy().tobytes()).hexdigest(),
            "scale": (1.0 / s).item(),
        }
    return result


def codes_of(x):
    """Codes and scale of activation rows as HF computes them; checked against what its forward pass uses."""
    s = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
    codes = (x * s).round().clamp(-128, 127)
    assert torch.equal(codes / s, ActQuant.apply(x))
    return codes.to(torch.int8), s.squeeze(-1)


def trace(model, ids, layers, logit_rows):
    """Inputs and outputs of every part in float32, by hooks."""
    seen = {}

    def record(name, of_input=None):
        def hook(_module, inputs, output):
            if of_input:
                seen[of_input] = inputs[0].detach()[0]
            seen[name] = output.detach()[0]
        return hook

    handles = [model.model.norm.register_forward_hook(record("final.norm", "final.x"))]
    for n in layers:
        block, p = model.model.layers[n], f"L{n}."
        attention, mlp = block.self_attn, block.mlp
        sub_norms = hasattr(mlp, "ffn_sub_norm")
        for module, name, of_input in [
            (block.input_layernorm, "attn_norm", "x"),
            (attention.q_proj, "q", None), (attention.k_proj, "k", None), (attention.v_proj, "v", None),
            *([(attention.attn_sub_norm, "attn_sub_norm", "attn")] if sub_norms else []),
            (attention.o_proj, "o", None if sub_norms else "attn"),
            (block.post_attention_layernorm, "ffn_norm", "x_mid"),
            (mlp.gate_proj, "gate", None), (mlp.up_proj, "up", None),
            *([(mlp.ffn_sub_norm, "ffn_sub_norm", "act")] if sub_norms else []),
            (mlp.down_proj, "down", None if sub_norms else "act"),
        ]:
            handles.append(module.register_forward_hook(record(p + name, of_input and p + of_input)))
    logits = logits_of(model, ids).float()
    for handle in handles:
        handle.remove()

    rope_positions = [p for p in ROPE_POSITIONS if p < len(ids)]
    config, at = model.config, torch.tensor(TRACE_POSITIONS)
    head_dim = config.hidden_size // config.num_attention_heads
    cos, sin = model.model.rotary_emb(seen["final.x"][None], torch.arange(len(ids))[None])
    out = {
        "trace.layers": torch.tensor(layers, dtype=torch.int32),
        "trace.positions": at.to(torch.int32),
        "rope.positions": torch.tensor(rope_positions, dtype=torch.int32),
        "rope.cos": cos[0, rope_positions, : head_dim // 2],
        "rope.sin": sin[0, rope_positions, : head_dim // 2],
        "final.logits": logits[at[:logit_rows]],
    }
    for n in layers:
        q, k = (seen[f"L{n}.{part}"].view(len(ids), -1, head_dim).transpose(0, 1)[None] for part in "qk")
        q, k = (t[0].transpose(0, 1).flatten(1) for t in apply_rotary_pos_emb(q, k, cos, sin))
        out[f"L{n}.q_rope"], out[f"L{n}.k_rope"] = q[at], k[at]
    for name, value in seen.items():
        whole = name[-2:] in (".k", ".v")
        out[name] = value[: max(TRACE_POSITIONS) + 1] if whole else value[at]
        quantised = name.endswith("_norm") if sub_norms else name.split(".")[-1] in ("attn_norm", "attn", "ffn_norm", "act")
        if quantised and not name.startswith("final"):
            out[name + ".codes"], out[name + ".scale"] = codes_of(out[name])
    return out


def reference(checkpoint, ids):
    """HF64's final hidden states and logits; KL and top-1 agreement of HF32 with them, one value an order of the features."""
    hf64 = load(checkpoint, torch.float64)
    hidden = []
    hf64.model.norm.register_forward_hook(lambda _module, _inputs, output: hidden.append(output.detach()[0]))
    logits64 = logits_of(hf64, ids)
    rebuilt = hidden[0].float().double() @ hf64.lm_head.weight.detach().T
    assert divergence(logits64, rebuilt)[0].mean() < 1e-11

    kl, top1 = [], []
    for order in range(ORDERS):
        hf32 = load(checkpoint, torch.float32)
        if order:
            reorder(hf32, order)
        position_kl, same = divergence(logits64, logits_of(hf32, ids))
        kl.append(position_kl.mean().item())
        top1.append(same.double().mean().item())
    return hidden[0], logits64, kl, top1


def write_golden(name, checkpoint, ids, out, layers, logit_rows):
    hidden, logits64, kl, top1 = reference(checkpoint, ids)
    floor = float(np.mean(kl))
    assert max(kl) < 1.5 * floor, f"the floor of {name} is not steady: {kl}"

    hf32 = load(checkpoint, torch.float32)
    tensors = trace(hf32, ids, layers, logit_rows)
    check_positions = [p for p in CHECK_POSITIONS if p < len(ids)]
    tensors |= {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "hidden64": hidden.float(),
        "check.positions": torch.tensor(check_positions, dtype=torch.int32),
        "check.logits64": logits64[check_positions].float(),
    }
    config = hf32.config
    meta = {
        "positions": len(ids),
        "floor": floor,
        "kl_hf64_hf32": kl,
        "top1_hf64_hf32": top1,
        "config": {
            "layers": config.num_hidden_layers, "hidden": config.hidden_size, "feed_forward": config.intermediate_size,
            "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
            "head_dim": config.hidden_size // config.num_attention_heads, "vocab": config.vocab_size,
            "activation": config.hidden_act, "tied": config.tie_word_embeddings,
        },
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "weights": ternary_weights(hf32),
    }
    directory = out / name
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "golden.safetensors"
    save_file({k: v.contiguous().clone() for k, v in sorted(tensors.items())}, path)
    (directory / "golden.json").write_text(json.dumps(meta, indent=1) + "\n")
    for file in directory.iterdir():
        file.chmod(0o644)
    print(f"{name:8} floor {floor:.3e} ({min(kl):.2e} to {max(kl):.2e}), top-1 {100 * np.mean(top1):.1f} %, {path.stat().st_size:,} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="folder of the demo model in Hugging Face's format; without it only the others are made")
    parser.add_argument("--only", nargs="*", help="names of the small models to make")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums must not depend on the machine's cores
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    for name in [*SMALL, *LLAMA]:
        if args.only is not None and name not in args.only:
            continue
        directory = args.out / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        if name in SMALL:
            seed, shape = SMALL[name]
            make_small(name, directory)
            ids = np.random.default_rng(seed).integers(0, 256, POSITIONS).tolist()
            layers = [0, shape["num_hidden_layers"] - 1]
        else:
            make_llama(name, directory)
            ids = np.random.default_rng(LLAMA[name][0]).integers(0, 128, POSITIONS).tolist()
            layers = [0]
        write_golden(name, directory, ids, args.out, layers, logit_rows=len(TRACE_POSITIONS))

    if args.demo is None:
        return
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.demo)
    tale = (args.out / "demo" / "tale.txt").read_text()  # held-out text, written for this project
    ids = [tokenizer.bos_token_id] + tokenizer(tale, add_special_tokens=False)["input_ids"]
    assert len(ids) >= POSITIONS, len(ids)
    write_golden("demo", args.demo, ids[:POSITIONS], args.out, layers=[0, 5], logit_rows=4)


if __name__ == "__main__":
    main()
