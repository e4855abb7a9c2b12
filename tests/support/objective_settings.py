"""Settings of every objective beside its defaults."""

from typing import Any

from minpro_megatron.config import objective as config

# other settings than the papers', among them the bounds between which most tokens of a small drift lie
OTHERS: dict[str, Any] = {
    "minpro": config.MinproConfig(clip_low=0.3, clip_high=0.2),
    "cispo": config.CispoConfig(clip_low=0.3, clip_high=0.2),
    "grpo": config.GrpoConfig(clip_low=0.1, clip_high=0.6, dual_clip=1.8),
    "gspo": config.GspoConfig(clip_low=0.1, clip_high=0.15),
    "m2po": config.M2poConfig(second_moment=0.3),
    "m2po_winsorized": config.M2poWinsorizedConfig(second_moment=0.3, clip_low=0.05, clip_high=0.1),
    "ctpo": config.CtpoConfig(
        log_clip_low=0.4, log_clip_high=0.2, log_dual_clip=0.6, position_exponent=0.2, log_clamp=1.5
    ),
    "ctpo_geomean": config.CtpoGeomeanConfig(log_clip_low=0.4, log_clip_high=0.2, log_dual_clip=0.6),
    "dppo": config.DppoConfig(threshold_low=0.05, threshold_high=0.1, largest_ratio=1.5),
    "cppo": config.CppoConfig(threshold=0.3, budget=0.15, smallest_weight=0.5, largest_ratio=1.5),
    "trm": config.TrmConfig(divergence="total_variation", max_divergence=0.6, mean_divergence=0.15),
    "sapo": config.SapoConfig(temperature_positive=0.7, temperature_negative=2.0),
    "vespo": config.VespoConfig(power_positive=1.0, decay_positive=0.5, power_negative=0.5, decay_negative=4.0),
    "pnpo": config.PnpoConfig(smallest_weight=0.8, largest_weight=1.3),
    "p3o": config.P3oConfig(),
    "sat": config.SatConfig(ratio="sequence", clip_low=0.3, clip_high=0.4, quantile=0.6),
    "prefix_ratio": config.PrefixRatioConfig(clip_low=0.9, clip_high=0.2),
    "prefix_filter": config.PrefixFilterConfig(quantile=0.3, clip_high=0.5),
    "scaled_cispo": config.ScaledCispoConfig(clip_low=0.5, clip_high=1.5),
    "shuffled_minpro": config.ShuffledMinproConfig(clip_high=1.0),
}
