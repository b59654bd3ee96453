"""Downstream tasks: a pretrained BERT finetuned on GLUE or SQuAD, its sparse weights kept sparse."""

from train.tasks.config import FinetuneConfig
from train.tasks.job import finetune
from train.tasks.registry import TASKS, Task, find_task
from train.tasks.saved import Finetuned, load_finetuned

__all__ = [
    "TASKS",
    "FinetuneConfig",
    "Finetuned",
    "Task",
    "find_task",
    "finetune",
    "load_finetuned",
]
