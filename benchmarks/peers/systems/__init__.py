"""One module a system: `prepare(meta)`, then `load(bundle)` gives an object with

    step()       one inference, or one training step (forward, backward, momentum SGD)
    outputs()    inference: the outputs of the last step, arrays in the order of the network's
    loss()       training: the loss of the last step
    trained()    training: the arrays of the bundle's `params.npz` as they are now

Importing the module imports the system; memory is counted from there.
"""
