"""List the paper's results (Arriola et al., ICLR 2025, arXiv 2503.09573), by its tables and sections."""

from __future__ import annotations

import math

# Test perplexities on LM1B (table 3) and OpenWebText (table 4); those of diffusion are upper bounds.
PERPLEXITY = {
    "ar": (22.83, 17.54),
    "l4": (28.23, 20.73),
    "l8": (29.83, 21.68),
    "l16": (30.60, 22.27),
    "mdlm": (31.78, 22.98),
}
# LM1B, table 1.
BLOCK_SIZE_ONE = {"ar": 22.88, "l1-uniform": 25.56, "l1-masked": 22.88}
# Variance of the NELBO after 328 M tokens (section 4.2): uniform mask rates, all masked.
BLOCK_SIZE_ONE_VARIANCE = (1.52, 0.11)
# LM1B, table 2: perplexity and variance of the NELBO by block size and interval.
CLIPPED = {
    128: {(0.0, 0.5): (31.72, 1.03), (0.3, 0.8): (31.78, 1.35), (0.5, 1.0): (31.92, 1.83), (0.0, 1.0): (31.78, 3.80)},
    16: {(0.0, 0.5): (31.27, 7.90), (0.3, 0.8): (31.19, 3.62), (0.5, 1.0): (31.29, 3.63), (0.0, 1.0): (31.33, 7.39)},
    4: {(0.0, 0.5): (29.23, 32.68), (0.3, 0.8): (29.37, 10.39), (0.5, 1.0): (29.16, 8.28), (0.0, 1.0): (29.23, 23.65)},
}
# The interval of least variance by block size (tables 2 and 8).
SEARCHED = {4: (0.45, 0.95), 16: (0.3, 0.8), 128: (0.0, 0.5)}
# Zero-shot perplexities of models of OpenWebText, table 5: PTB, WikiText.
ZERO_SHOT = {"ar": (81.07, 25.32), "l4": (96.81, 31.31), "mdlm": (90.96, 33.22)}
# Nats a token that MDLM costs more than L'=4 (tables 4 and 5), by the names that texts have here.
ADVANTAGE = {
    "held-out": math.log(PERPLEXITY["mdlm"][1] / PERPLEXITY["l4"][1]),
    "ptb": math.log(ZERO_SHOT["mdlm"][0] / ZERO_SHOT["l4"][0]),
    "wikitext2": math.log(ZERO_SHOT["mdlm"][1] / ZERO_SHOT["l4"][1]),
}
# Generative perplexity under GPT-2 large at 1,024 tokens, table 7.
GENERATIVE = {"ar": 14.1, "l4": 25.7, "l8": 30.4, "l16": 33.4, "mdlm": 46.8}
# Longest of 500 documents with blocks of 16, and SEDD's (table 6).
LONGEST, LONGEST_OF_FIXED = 9982, 1024
# Section 6.3: one vectorised pass against two; figure 4: FlexAttention against a dense mask.
VECTORISED_GAIN = "20–25%"
FLEX_GAIN = "up to about 5×"
