"""SwitchLoRA: low-rank vectors are switched during training, so that updates add up to full rank.

Zhou, Wang, Xu, arXiv:2406.06564. Where the authors' code and paper differ, see docs/fidelity.md.

    init         how vectors are drawn, and which ranks can switch
    schedule     how often vectors are switched
    layer        one linear layer: its vectors, its candidate vectors, the switch
    optimizer    AdamW that counts steps per vector
    controller   all layers of a model in one training run
    replica      the state that a server and its clients share without sending it
"""
