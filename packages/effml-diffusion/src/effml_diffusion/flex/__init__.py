"""FlexMDM, masked diffusion that generates the length too: masks are inserted into gaps, and masks are revealed.

flex_mdm            the objective, around any network     flex_likelihood    bounds in nats, length included
interpolant         when tokens appear, are revealed      insertion_loss     what predicting a gap costs
texts               clean texts, and what is given        flex_state         noisy texts and their gaps
sampler             generation                            canvas             a text that grows meanwhile
insertion_counts    how many masks go where               rows               ragged rows as padded tensors
length_guidance     lengths on request                    length_statistics  lengths that came out
"""

from effml_diffusion.flex.canvas import Canvas
from effml_diffusion.flex.flex_likelihood import FlexBound
from effml_diffusion.flex.flex_mdm import FlexLoss, FlexMDM
from effml_diffusion.flex.interpolant import FlowSchedule, Interpolant
from effml_diffusion.flex.length_guidance import LengthGuidance
from effml_diffusion.flex.length_statistics import LengthStatistics, length_statistics
from effml_diffusion.flex.sampler import Flex, FlexOutput

__all__ = [
    "Canvas",
    "Flex",
    "FlexBound",
    "FlexLoss",
    "FlexMDM",
    "FlexOutput",
    "FlowSchedule",
    "Interpolant",
    "LengthGuidance",
    "LengthStatistics",
    "length_statistics",
]
