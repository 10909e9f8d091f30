"""Small trained matrices between fixed factors: ``ΔW = (alpha / r) U R V`` (Fed-SB, RAVAN).

payload        the blocks of R of all layers, as they travel; U and V follow from the run's seed
layer          one linear layer
"""
