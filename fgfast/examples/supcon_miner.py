"""SupCon of fgfast with the hard pairs of a miner of pytorch-metric-learning, and its value beside theirs.

python -m fgfast.examples.supcon_miner    (needs pytorch-metric-learning)
"""

import torch
from torch import nn


def main() -> dict[str, float]:
    """Train an embedding on mined pairs until a new sample's neighbours share its class."""
    from pytorch_metric_learning import losses, miners

    from fgfast import SupConLoss  # instead of losses.SupConLoss

    torch.manual_seed(0)
    centres, labels = torch.randn(16, 8), torch.arange(16).repeat_interleave(8)  # 128 vectors of 16 classes
    model = nn.Linear(32, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    miner, criterion = miners.MultiSimilarityMiner(), SupConLoss(temperature=0.1)

    def embed() -> torch.Tensor:
        noisy = torch.cat([centres[labels], 2 * torch.randn(128, 24)], 1)  # another sample at every call
        return model(noisy)

    def precision() -> float:
        embeddings = embed().detach()
        nearest = torch.cdist(embeddings, embeddings).fill_diagonal_(torch.inf).argmin(1)
        return float((labels[nearest] == labels).float().mean())

    before = precision()
    for step in range(100):
        embeddings = embed()
        pairs = miner(embeddings, labels)  # indices: anchors and positives, anchors and negatives
        loss = criterion(embeddings, labels, pairs)
        if step == 0:
            theirs = losses.SupConLoss(temperature=0.1)(embeddings, labels, pairs)
            ours, mined = loss.item(), len(pairs[0]) + len(pairs[2])
            print(f"{mined} of {128 * 127} pairs: pytorch-metric-learning {theirs:.6f}, fgfast {loss:.6f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = precision()
    print(f"nearest neighbour of the same class: {before:.0%}, after {step + 1} steps {after:.0%}")
    return {"ours": ours, "theirs": theirs.item(), "mined": mined, "before": before, "after": after}


if __name__ == "__main__":
    main()
