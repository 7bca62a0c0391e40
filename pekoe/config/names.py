"""What TRL and verl call our keys, for errors and for the table in the docs.

Names of TRL 1.0 (GRPOConfig and transformers' TrainingArguments) and of verl 0.7 (ppo_trainer.yaml).
"""

from __future__ import annotations

from typing import NamedTuple


class Names(NamedTuple):
    """One of our keys, TRL's and verl's names for it, and what differs."""

    ours: str
    trl: str = ""
    verl: str = ""
    note: str = ""
    also: str = ""  # what else it is called, by vLLM or in older versions

    def shares(self, name: str) -> int:
        """How many parts from its end on `name` shares with one of the others' names: x.n shares 1 with rollout.n."""
        others = ", ".join(filter(None, (self.trl, self.verl, self.also))).split(", ")
        return max(_same_end(name.split("."), other.split(".")) for other in others)


def _same_end(a: list[str], b: list[str]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y), min(len(a), len(b)))


NAMES = (
    Names("num_steps", "max_steps", "trainer.total_training_steps", "ours are rollout batches, not optimizer steps",
          also="num_train_epochs, trainer.total_epochs"),
    Names("run.dir", "output_dir", "trainer.default_local_dir"),
    Names("run.seed", "seed, data_seed", "data.seed"),
    Names("model.path", "model_name_or_path, model", "actor_rollout_ref.model.path", "a directory, not a name"),
    Names("model.dtype", "bf16, fp16", "actor.fsdp_config.model_dtype"),
    Names("model.lora.rank", "lora_r, use_peft", "actor_rollout_ref.model.lora_rank", also="peft_config"),
    Names("model.lora.alpha", "lora_alpha", "actor_rollout_ref.model.lora_alpha"),
    Names("model.lora.targets", "lora_target_modules", "actor_rollout_ref.model.target_modules", "absent: all-linear"),
    Names("data.train", "dataset_name, train_dataset", "data.train_files", also="dataset, data.path, data.file"),
    Names("data.max_prompt_tokens", "max_prompt_length", "data.max_prompt_length"),
    Names("rollout.prompts_per_step", "generation_batch_size, per_device_train_batch_size", "data.train_batch_size",
          "prompts; TRL counts responses", also="batch_size"),
    Names("rollout.samples_per_prompt", "num_generations", "rollout.n"),
    Names("rollout.max_new_tokens", "max_completion_length", "data.max_response_length", also="max_tokens"),
    Names("rollout.temperature", "temperature", "rollout.temperature"),
    Names("rollout.top_p", "top_p", "rollout.top_p"),
    Names("rollout.top_k", "top_k", "rollout.top_k", "0 is off; verl: -1"),
    Names("rollout.dynamic_rounds", "", "algorithm.filter_groups.enable, max_num_gen_batches"),
    Names("rollout.replay_routing", "", "rollout.enable_rollout_routing_replay, actor.router_replay.mode"),
    Names("rollout.max_lag", "", "async_training.staleness_threshold", "steps; verl: a share of a batch"),
    Names("engine.backend", "use_vllm, vllm_mode", "rollout.name"),
    Names("engine.server.urls", "vllm_server_base_url, vllm_server_host"),
    Names("engine.server.args", "vllm_tensor_parallel_size", "rollout.tensor_model_parallel_size",
          also="tensor_parallel_size"),
    Names("engine.kv_gib", "vllm_gpu_memory_utilization", "rollout.gpu_memory_utilization", "GiB, not a share"),
    Names("engine.max_running", "", "rollout.max_num_seqs"),
    Names("algo.advantage", "scale_rewards", "algorithm.adv_estimator, norm_adv_by_std_in_grpo"),
    Names("algo.minibatches", "steps_per_generation, gradient_accumulation_steps", "actor.ppo_mini_batch_size",
          "a number of them, not their size"),
    Names("algo.clip_low", "epsilon", "actor.clip_ratio, clip_ratio_low"),
    Names("algo.clip_high", "epsilon_high", "actor.clip_ratio_high"),
    Names("algo.normalise", "loss_type", "actor.loss_agg_mode",
          "token: dapo, token-mean. sequence: grpo, seq-mean-token-mean. max_length: dr_grpo"),
    Names("algo.kl", "beta", "actor.kl_loss_coef, kl_coef", "k3, verl's low_var_kl",
          also="use_kl_loss, use_kl_in_reward, kl_loss_type"),
    Names("algo.correction", "vllm_importance_sampling_correction, vllm_importance_sampling_mode",
          "algorithm.rollout_correction.rollout_is"),
    Names("algo.correction_limit", "vllm_importance_sampling_cap", "rollout_is_threshold"),
    Names("algo.overlong_tokens", "", "overlong_buffer_cfg.len"),
    Names("algo.overlong_penalty", "", "overlong_buffer_cfg.penalty_factor"),
    Names("algo.mask_truncated", "mask_truncated_completions"),
    Names("optim.lr", "learning_rate", "actor.optim.lr"),
    Names("optim.schedule", "lr_scheduler_type", "actor.optim.lr_scheduler_type, warmup_style"),
    Names("optim.warmup_fraction", "warmup_ratio, warmup_steps", "actor.optim.lr_warmup_steps_ratio, lr_warmup_steps"),
    Names("optim.weight_decay", "weight_decay", "actor.optim.weight_decay"),
    Names("optim.beta1", "adam_beta1", "actor.optim.betas"),
    Names("optim.beta2", "adam_beta2", "actor.optim.betas"),
    Names("optim.eps", "adam_epsilon", also="epsilon"),
    Names("optim.grad_clip", "max_grad_norm", "actor.grad_clip, clip_grad"),
    Names("train.token_budget", "", "actor.ppo_max_token_len_per_gpu, ppo_micro_batch_size_per_gpu",
          "tokens, not sequences", also="log_prob_micro_batch_size_per_gpu"),
    Names("train.activation_checkpointing", "gradient_checkpointing", "model.enable_gradient_checkpointing"),
    Names("train.compile", "torch_compile", "actor.use_torch_compile"),
    Names("train.save_every", "save_steps", "trainer.save_freq"),
    Names("train.keep_checkpoints", "save_total_limit", "trainer.max_actor_ckpt_to_keep"),
    Names("verify.reward", "reward_funcs",
          "custom_reward_function.path, custom_reward_function.name, custom_reward_function", "MODULE:NAME"),
    Names("verify.arguments", "", "custom_reward_function.reward_kwargs"),
    Names("eval.data", "eval_dataset", "data.val_files"),
    Names("eval.every", "eval_steps", "trainer.test_freq"),
    Names("eval.samples", "num_generations_eval, num_generations", "rollout.val_kwargs.n"),
    Names("eval.temperature", "", "rollout.val_kwargs.temperature"),
    Names("eval.top_p", "", "rollout.val_kwargs.top_p"),
    Names("curate.samples", "num_generations", "rollout.n"),
    Names("cluster.training.cp", "", "actor.ulysses_sequence_parallel_size"),
    Names("cluster.training.ranks", "", "trainer.n_gpus_per_node, nnodes"),
    Names("track.wandb", "report_to", "trainer.logger, project_name"),
    Names("sft.epochs", "num_train_epochs", "trainer.total_epochs"),
    Names("sft.batch_size", "per_device_train_batch_size", "data.train_batch_size"),
    Names("sft.eval_every", "eval_steps", "trainer.test_freq"),
    Names("parallel.cp", "context_parallel_size", "ulysses_sequence_parallel_size"),
)  # fmt: skip

# Names of theirs that have no key here, and what is done in its place.
WITHOUT_KEY = {
    ("logging_steps", "log_level"): "every step is printed, and in journal.jsonl",
    ("log_completions", "num_completions_to_print"): "every response is kept; pekoe report shows them",
    ("packing", "padding_free", "use_remove_padding"): "responses are always packed, without padding",
    ("num_iterations", "ppo_epochs"): "a response is trained on once, in one of algo.minibatches optimizer steps",
    ("reward_weights",): "the function that verify.reward names may add rewards up",
    ("entropy_coeff", "entropy_coef"): "the loss has no entropy bonus",
    ("gamma", "lam"): "both are 1, as there is no critic",
    ("min_p", "repetition_penalty"): "tokens are sampled by temperature, top_p and top_k alone",
    ("importance_sampling_level",): "ratios are of tokens; algo.correction has a mask of sequences",
    ("truncation", "filter_overlong_prompts"): "data.skip_malformed leaves out prompts beyond data.max_prompt_tokens",
    ("val_before_train", "eval_on_start"): "with eval.every, held-out problems are measured before the first step, too",
}  # fmt: skip


def without_key(name: str) -> str:
    """What is done in place of a setting of theirs that has no key here, as a hint; "" for other names."""
    last = name.replace("-", "_").lower().rpartition(".")[2]
    return next((f" There is none: {why}." for names, why in WITHOUT_KEY.items() if last in names), "")
