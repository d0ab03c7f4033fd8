"""A contrast over a batch whose activations do not fit: the encoder sees it in chunks, the loss sees all of it.

python -m fgfast.examples.gradient_caching
"""

import torch
from torch import Tensor, nn

import fgfast


def main(batch: int = 512, chunk: int = 32) -> dict[str, float]:
    """Compare gradients and stored activations with those of the whole batch at once."""
    torch.manual_seed(0)
    # GroupNorm instead of BatchNorm, which would take the statistics of a chunk.
    layers = (nn.Conv2d(3, 32, 3, 2), nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(), nn.Flatten())
    encoder, head = nn.Sequential(*layers, nn.Linear(64 * 7 * 7, 64)), nn.Linear(64, 32)
    criterion = fgfast.NTXentLoss(temperature=0.1)
    images = torch.rand(batch, 3, 32, 32)  # 2 i and 2 i + 1 are the views of image i

    def loss(features: Tensor) -> Tensor:
        z = head(features)  # [B, 32]
        return criterion(z[::2], z[1::2])

    def stored(n: int) -> float:
        """MiB of tensors in the graph of n images, those of its weights included."""
        kept = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            _ = encoder(images[:n])  # held until the graph is counted
            return sum(kept.values()) / 2**20

    whole = loss(encoder(images))
    whole.backward()
    expected = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    cached = fgfast.cached_contrast(encoder, images, loss, chunk)  # computes the gradients, too: no backward()
    pairs = zip(encoder.parameters(), expected, strict=True)
    difference = max(float((p.grad - e).norm() / e.norm()) for p, e in pairs if p.grad is not None)
    print(f"loss of {batch} images: at once {whole:.6f}, in chunks of {chunk} {cached:.6f}")
    mib = {"batch_mib": stored(batch), "chunk_mib": stored(chunk)}
    print(f"gradients differ by {difference:.1e}; graph: {mib['batch_mib']:.1f} MiB, of a chunk {mib['chunk_mib']:.1f}")
    return {"whole": whole.item(), "cached": cached.item(), "difference": difference, **mib}


if __name__ == "__main__":
    main()
