"""A demo: a small network learns handwritten digits as a stream.

``python -m fusestep.demo`` trains a network written in plain NumPy on scikit-learn's digits, which
arrive a few at a time, as they would in an application that learns while it is used: each batch is
first a test and then a lesson. It then measures what one optimizer step costs, beside the same rule
in plain NumPy and in PyTorch, and draws both. It needs ``pip install "fusestep[demo]"``.

======================  ===========================================================
:mod:`.options`         the command line
:mod:`.stream`          digits in random order, in batches of random size
:mod:`.network`         the network and its gradients
:mod:`.learning`        test-then-train, and the accuracy over time
:mod:`.plain`           the six rules by hand, in plain NumPy
:mod:`.contenders`      one rule in fusestep, plain NumPy and PyTorch
:mod:`.timing`          the median time of a step
:mod:`.report`          what is printed
:mod:`.picture`         what is drawn
:mod:`.run`             all of it, in order
======================  ===========================================================
"""
