"""A run's length in passes over the data, as steps."""

import dataclasses

from vla_jax.config import Config


def with_steps(config: Config, windows: int) -> Config:
    """The config with its epochs counted out; unchanged where it has none.

    Args:
        config: of the run.
        windows: in the training data; an epoch is as many steps as full batches of them.
    """
    train, optim = config.train, config.optim
    # Data of less than a batch still make a step.
    epoch = max(1, windows // train.batch_size)
    if train.epochs:
        train = dataclasses.replace(train, steps=max(1, round(train.epochs * epoch)))
    if train.check_epochs:
        interval = max(1, round(train.check_epochs * epoch))
        train = dataclasses.replace(train, eval_every=interval, save_every=interval)
    if optim.warmup_epochs:
        warmup = optim.warmup_steps + round(optim.warmup_epochs * epoch)
        optim = dataclasses.replace(optim, warmup_steps=warmup)
    return dataclasses.replace(config, train=train, optim=optim)
