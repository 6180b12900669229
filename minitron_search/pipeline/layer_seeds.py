"""Choose the layers that the search drops first, by `space.axes.drop_block.seeds`."""

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
    """Return the layers to drop first, for every configured number of layers; none without `seeds`."""
    config, run_dir, drop_block = prepared.config, prepared.run_dir, prepared.config.space.axes.drop_block
    if drop_block is None or drop_block.seeds == "none":
        return []
    lengths = [length for length in drop_block.numbers if length]
    if drop_block.seeds == "sweep":
        blocks = best_blocks(run_dir.read_depth_recommendation(), config.search.ranks_by)
        return [block(start, length) for length, start in blocks.items()]
    if drop_block.seeds == "laco":
        return _laco(prepared, lengths)
    choose = least_block if drop_block.seeds == "bi" else least_layers
    return choose(Importance.load(run_dir.importance).block_bi, lengths)


def _laco(prepared: Prepared, lengths: list[int]) -> list[Cut]:
    """Return the layers that LaCo merges away, and write down which layers it merges."""
    run_dir, pruned, windows = prepared.run_dir, prepared.pruned, calibration_windows(prepared)
    collapse = partial(on_all_cpus, run_dir, collapsed, pruned.folder, windows, lengths)
    write_merges(run_dir, [pruned.fingerprint, windows.tolist(), lengths], collapse)
    return merged_away(read_merges(run_dir), pruned.config.num_hidden_layers)
