"""A perceptron in a hand-written Chainer loop on MNIST, unchanged but for its import.

    python examples/chainer_mnist_perceptron.py            with branchgraph.chainer
    python examples/chainer_mnist_perceptron.py chainer    with Chainer itself, where it still runs

Reads the four idx files from $BRANCHGRAPH_DATA/mnist. 784-100-100-10, ReLU, Adam, batches of 100;
prints the mean training loss and the test accuracy of every epoch.
"""

import gzip
import importlib
import os
import sys
import time

import numpy as np

chainer = importlib.import_module(sys.argv[1] if len(sys.argv) > 1 else "branchgraph.chainer")
F, L = chainer.functions, chainer.links


class Perceptron(chainer.Chain):
    """Three dense layers."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(None, 100)
            self.l2 = L.Linear(None, 100)
            self.l3 = L.Linear(None, 10)

    def forward(self, x):
        """Logits of a batch of images."""
        return self.l3(F.relu(self.l2(F.relu(self.l1(x)))))


def read(name):
    """One idx file."""
    with gzip.open(os.path.join(os.environ["BRANCHGRAPH_DATA"], "mnist", name + ".gz")) as f:
        raw = f.read()
    sizes = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


def main(epochs=3, size=100):
    """Train and test."""
    x = read("train-images-idx3-ubyte").reshape(-1, 784).astype(np.float32) / 255
    t = read("train-labels-idx1-ubyte").astype(np.int32)
    test_x = read("t10k-images-idx3-ubyte").reshape(-1, 784).astype(np.float32) / 255
    test_t = read("t10k-labels-idx1-ubyte").astype(np.int32)
    np.random.seed(0)
    model = Perceptron()
    optimizer = chainer.optimizers.Adam()
    optimizer.setup(model)
    for epoch in range(epochs):
        start, total = time.time(), 0.0
        order = np.random.permutation(len(x))
        for i in range(0, len(x), size):
            rows = order[i : i + size]
            loss = F.softmax_cross_entropy(model(x[rows]), t[rows])
            model.cleargrads()
            loss.backward()
            optimizer.update()
            total += float(loss.array) * len(rows)
        seconds = time.time() - start
        with chainer.using_config("train", False), chainer.no_backprop_mode():
            accuracy = float(F.accuracy(model(test_x), test_t).array)
        print(
            f"epoch {epoch + 1}: loss {total / len(x):.6f}, "
            f"test accuracy {accuracy:.4f}, {seconds:.1f} s"
        )


if __name__ == "__main__":
    main()
