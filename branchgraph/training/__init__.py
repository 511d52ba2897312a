"""Compiled training steps, losses, loops, checkpoints and evaluation."""

from branchgraph.training.checkpoint import Recipe, load_checkpoint, save_checkpoint
from branchgraph.training.evaluation import Evaluator, early_exits
from branchgraph.training.history import History, Progress, write_log
from branchgraph.training.loop import Training, train
from branchgraph.training.loss import joint_loss

__all__ = [
    "Evaluator",
    "History",
    "Progress",
    "Recipe",
    "Training",
    "early_exits",
    "joint_loss",
    "load_checkpoint",
    "save_checkpoint",
    "train",
    "write_log",
]
