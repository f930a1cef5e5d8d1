"""Stands for torch in processes that tests of training start: tensorboardX imports it if it is installed, to no use
here, and that takes longer than all else that such a process does."""

raise ImportError("left out of this process")
