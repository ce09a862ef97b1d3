"""Models whose memory is worth dividing."""

from __future__ import annotations

from torch.nn import functional

from benchmarks.models import Case, CausalTransformer, mlp, token_loss, token_rows, vectors

# Of a batch, on both sides.
NUM_MICRO_BATCHES = 8
CASES = {
    case.name: case
    for case in (
        Case(
            name="mlp-25m",
            text="MLP, 25 M parameters in 24 layers, batch 64",
            build=lambda: mlp(*[1024] * 25),
            data=lambda: vectors(1024, num_rows=128),
            loss=functional.cross_entropy,
            batch_per_engine=64,
            probe_steps=3,
            optimizer="sgd",
        ),
        Case(
            name="mlp-large-layers",
            text="MLP, 34 M parameters in 8 layers, batch 64",
            build=lambda: mlp(*[2048] * 9),
            data=lambda: vectors(2048, num_rows=128),
            loss=functional.cross_entropy,
            batch_per_engine=64,
            probe_steps=3,
            optimizer="sgd",
        ),
        Case(
            name="gpt-25m",
            text="causal transformer, 25 M parameters in 8 blocks, batch 16 x 64 tokens",
            build=lambda: CausalTransformer(width=512, num_blocks=8, num_heads=8),
            data=token_rows,
            loss=token_loss,
            batch_per_engine=16,
            probe_steps=3,
            optimizer="sgd",
        ),
        Case(
            name="warm",
            text="MLP that imports and builds what the others use",
            build=lambda: mlp(1024, 64, 64, 10),
            data=lambda: vectors(1024, num_rows=128),
            loss=functional.cross_entropy,
            batch_per_engine=64,
            probe_steps=3,
            optimizer="sgd",
        ),
    )
}
