"""A width candidate as views on the memory-mapped permuted teacher: scored as it is, without a copy of its weights."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from minitron_search.models.architecture import Architecture
from minitron_search.models.families import student_config
from minitron_search.pruning.rankings import Rankings
from minitron_search.pruning.trimming import reader, student_of, trimmed_weights


def as_views(folder: Path, architecture: Architecture) -> PreTrainedModel:
    """The student of `architecture` inside the permuted teacher in `folder`, in the dtype the folder is stored in: of a
    float32 folder, the weights that `trim` copies. It is not to be written to.

    A parameter is one strided tensor, and what is kept is one wherever it leads each dimension: whole layers, hidden
    channels, neurons, whole groups of heads. Elsewhere the few weights concerned are copied:

    - query heads dropped inside groups, where more than one group is left: the weights with a `query` dimension (in a
      stock model a head's place says its group, so no order of the teacher's heads makes them lead in every group);
    - projections fused one after another (`q+k+v` of GPT-2 and Phi-3, `gate+up` of Phi-3) where a part shrinks;
    - Gemma's embedding where hidden_size shrinks, which is scaled, and with a tied head its final norm;
    - the bias of a tied head (Phi), which transformers pads anew.

    Matrix products read rows at any stride, no slower and to the same bits (MKL, but for single rows).
    """
    config = AutoConfig.from_pretrained(folder)
    kept = trimmed_weights(reader(folder), config, architecture, Rankings.identity(config))
    return student_of(student_config(config, architecture), kept, config.dtype)
