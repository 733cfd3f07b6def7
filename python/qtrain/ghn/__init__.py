"""Graph hypernetworks (GHN): a network that predicts the weights of networks it has not seen.

``space`` draws the networks to learn from, ``graph`` turns any network into the graph of its
operations, ``model`` is the GHN itself, ``checkpoint`` its files. GHN-2 is Knyazev et al. 2021
(arXiv 2110.13100), GHN-3 Knyazev et al. 2023 (2303.04143), their quantization-aware kin GHN-Q and
GHN-QAT Yun and Wong (2208.12489, 2309.13773).
"""
