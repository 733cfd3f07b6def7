"""Trainers on top of qkernels: float training, PTQ and QAT, their runs and reports.

``qtrain demo`` is the place to start; ``qtrain --help`` lists the rest. From Python::

    from qtrain.loop import Recipe, TrainConfig, train

    train(TrainConfig(dataset="digits", model="cnn", epochs=5), Recipe(), "runs/float")
"""
