"""Compiled training steps, losses and loops."""

from branchgraph.training.loop import History, Training, train
from branchgraph.training.loss import joint_loss

__all__ = ["History", "Training", "joint_loss", "train"]
