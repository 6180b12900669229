"""Which layers the search drops first, as `space.axes.drop_block.seeds` says."""

from functools import partial

from minitron_search.cluster.placement import on_all_cpus
from minitron_search.depth.layer_choice import least_block, least_layers, merged_away, read_merges, write_merges
from minitron_search.depth.recommendation import best_blocks
from minitron_search.depth.sweep import Cut, block
from minitron_search.importance.importance import Importance
from minitron_search.pipeline.importance import calibration_windows
from minitron_search.planning.prepare import Prepared
from minitron_search.pruning.laco import collapsed


def layer_seeds(prepared: Prepared) -> list[Cut]:
    """The layers that `space.axes.drop_block.seeds` says to drop first, of every length."""
    config, run, asked = prepared.config, prepared.run, prepared.config.space.axes.drop_block
    lengths = [length for length in asked.lengths if length] if asked else []
    if asked is None or asked.seeds == "none":
        return []
    if asked.seeds == "sweep":
        blocks = best_blocks(run.read_depth_recommendation(), config.search.ranks_by)
        return [block(start, length) for length, start in blocks.items()]
    if asked.seeds == "laco":
        windows = calibration_windows(prepared)
        collapse = partial(on_all_cpus, run.depot, collapsed, prepared.teacher_folder, windows, lengths)
        write_merges(run, [prepared.teacher_fingerprint, windows.tolist(), lengths], collapse)
        return merged_away(read_merges(run), prepared.teacher_config.num_hidden_layers)
    choose = least_block if asked.seeds == "bi" else least_layers
    return choose(Importance.load(run.importance).block_bi, lengths)
