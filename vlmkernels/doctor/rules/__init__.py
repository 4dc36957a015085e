"""The table of rules."""

from vlmkernels.doctor.rules import answers, lengths, policy, rewards, updates

RULES = (*rewards.RULES, *lengths.RULES, *policy.RULES, *answers.RULES, *updates.RULES)
