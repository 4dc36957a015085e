"""An objective in plain PyTorch, written as in trainers, with a method for each part so that a test can plant a fault in it."""

import math

import torch

from vlmkernels.conformance import AdvantageBatch, GRPOLossConfig, LossBatch, load

Vlmkernels = type(load("vlmkernels:Vlmkernels"))
EXPONENTIAL = 20.0  # bounds the exponents of vespo


class Plain(Vlmkernels):
    """What vlmkernels declares, by autograd."""

    name = "plain"
    packages = ()
    documented = ()

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        mask = self.mask(batch)
        logps, old, ref, rollout, entropy = (
            None if x is None else self.read(x, mask)
            for x in (batch.logps, batch.old_logps, batch.ref_logps, batch.rollout_logps, batch.entropy)
        )
        old = self.policy(logps) if old is None else old
        advantages = self.advantage(batch)[:, None].to(logps.dtype)
        log_ratio = logps - old
        ratio = self.ratio(self.sequence_mean(log_ratio, mask) if config.level == "sequence" else log_ratio)
        weight = torch.ones_like(logps) if rollout is None else self.correction(old, rollout, mask, config)
        if config.loss_type == "vespo":
            # The correction enters the weight of the sequence.
            objective, weight = self.vespo(logps, log_ratio, weight, advantages, mask, config), torch.ones_like(logps)
        else:
            surrogate = {"cispo": self.cispo, "sapo": self.sapo}.get(config.loss_type, self.ppo)
            objective = surrogate(logps, ratio, advantages, config)
        kept = mask
        if config.top_entropy_quantile < 1 and mask.any():
            kept = mask & self.high(entropy, torch.quantile(entropy[mask], 1 - config.top_entropy_quantile))
        if config.off_policy_mask_threshold is not None:
            drift = self.sequence_mean(-log_ratio.detach(), mask)
            weight = weight * ((advantages >= 0) | (drift <= config.off_policy_mask_threshold))
        loss = -objective * weight * kept
        if config.beta:
            loss = loss + config.beta * self.kl(ref - logps, config) * (ratio if config.use_bias_correction_kl else 1)
        total = self.aggregate(self.select(loss, mask), mask, batch, config)
        if config.entropy_coef:
            mean = (entropy * kept).sum() / kept.sum().clamp(min=1)
            total = total - config.entropy_coef * mean / batch.accumulation_steps
        return total

    def mask(self, batch):
        return batch.loss_mask

    def read(self, x, mask):
        return torch.where(mask, x, 0)

    def select(self, loss, mask):
        return loss * mask

    def policy(self, logps):
        return logps.detach()

    def advantage(self, batch):
        return batch.advantages

    def length(self, mask):
        return mask.sum(1, keepdim=True).clamp(min=1)

    def sequence_mean(self, x, mask):
        return (x * mask).sum(1, keepdim=True) / self.length(mask)

    def ratio(self, log_ratio):
        return log_ratio.exp()

    def correction(self, old, rollout, mask, config):
        log_ratio = old - rollout
        if config.rollout_correction.startswith("sequence"):
            total = (log_ratio * mask).sum(1, keepdim=True)
            log_ratio = total / self.length(mask) if config.rollout_sequence_ratio == "mean" else total
        ratio, low, high = log_ratio.exp(), config.rollout_clip_min or 0.0, config.rollout_clip_max or math.inf
        if config.rollout_correction.endswith("truncate"):
            return ratio.clamp(low, high)
        return torch.where((ratio < low) | (ratio > high), 0, ratio)

    def high(self, entropy, threshold):
        return entropy >= threshold

    def ppo(self, logps, ratio, advantages, config):
        clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.clip_high)
        return torch.minimum(self.capped(ratio, config) * advantages, clipped * advantages)

    def capped(self, ratio, config):
        return ratio if config.delta is None else ratio.clamp(max=config.delta)

    def cispo(self, logps, ratio, advantages, config):
        return ratio.clamp(max=config.clip_high).detach() * advantages * logps

    def sapo(self, logps, ratio, advantages, config):
        tau = torch.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
        return torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages

    def vespo(self, logps, log_ratio, weight, advantages, mask, config):
        smallest = math.log(1e-8)
        logs = log_ratio.detach().clamp(-EXPONENTIAL, EXPONENTIAL) + weight.log().clamp(min=smallest)
        log_weight = (logs * mask).sum(1, keepdim=True).clamp(smallest, EXPONENTIAL)
        k = torch.where(advantages >= 0, config.vespo_k_pos, config.vespo_k_neg)
        rate = torch.where(advantages >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg)
        return (rate + k * log_weight - rate * log_weight.exp()).exp() * advantages * logps

    def kl(self, x, config):
        return {"k1": -x, "k2": x.square() / 2, "k3": x.exp() - x - 1}[config.kl_estimator]

    def aggregate(self, loss, mask, batch, config):
        if config.loss_type in ("bnpo", "dapo", "cispo", "vespo"):
            return loss.sum() / self.items(batch)
        if config.loss_type == "dr_grpo":
            mean = loss.sum() / (len(loss) * config.max_completion_length)
        elif config.loss_type == "luspo":
            mean = loss.sum(1).mean()
        else:
            mean = (loss.sum(1, keepdim=True) / self.length(mask)).mean()
        return mean / batch.accumulation_steps

    def items(self, batch):
        return max(batch.tokens, 1) / batch.num_processes

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        """Compute mean baselines and group scales group by group, and the others as vlmkernels."""
        if batch.baseline != "mean" or batch.scale != "group":
            return super().advantages(batch)
        rewards = self.total(batch)
        return torch.cat([self.relative(group) for group in rewards.split(self.sizes(batch))])

    def sizes(self, batch):
        return list(batch.group_sizes)

    def total(self, batch):
        total = (batch.rewards * torch.tensor(batch.weights)).nansum(1)
        return torch.where(batch.rewards.isnan().all(1), torch.nan, total)

    def relative(self, group):
        scored = group[~group.isnan()]
        if len(scored.unique()) <= 1:
            return torch.zeros_like(group)
        return ((group - self.mean(scored)) / (self.std(scored) + self.advantage_eps)).nan_to_num()

    def mean(self, scored):
        return scored.mean()

    def std(self, scored):
        return scored.std()
