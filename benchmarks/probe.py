"""What labels would give on the same features: the ceiling of anything that learns a linear classifier on them."""

import torch
from torch import Tensor

PENALTIES = (1e-4, 1e-3, 1e-2)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Top-1 of multinomial logistic regression on labels; the penalty is chosen on a fifth of the training images."""

    def fitted(rows: Tensor, answers: Tensor, penalty: float) -> torch.nn.Linear:
        torch.manual_seed(0)
        linear = torch.nn.Linear(rows.shape[1], int(labels.max()) + 1)
        optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(linear(rows), answers) + penalty * linear.weight.square().sum()
            torch.autograd.backward(value)
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        return linear

    def top1(linear: torch.nn.Linear, rows: Tensor, answers: Tensor) -> float:
        return float((linear(rows).argmax(1) == answers).float().mean())

    middle, spread = train.mean(0), train.std(0) + 1e-6
    train, test = (train - middle) / spread, (test - middle) / spread
    cut = len(train) * 4 // 5
    trials = {p: top1(fitted(train[:cut], labels[:cut], p), train[cut:], labels[cut:]) for p in PENALTIES}
    return top1(fitted(train, labels, max(trials, key=trials.__getitem__)), test, truth)
