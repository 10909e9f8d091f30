"""SwitchLoRA: low-rank vectors are exchanged all the time, so that updates add up to full rank.

Zhou, Wang, Xu, arXiv:2406.06564. Where the authors' code and paper differ, see docs/fidelity.md.

    initial      how vectors are drawn, and which ranks can switch
    schedule     how often vectors are exchanged
    layer        one linear layer: its vectors, its pools of candidates, the exchange
    optimizer    AdamW that counts steps vector by vector
    controller   all layers of a model through one training run
    replica      the state that a server and its clients share without sending it
"""
