//! Training: data, losses, the trainer, and the command `finetune`.

mod coco;
#[path = "../common/mod.rs"]
mod common;
mod data;
mod distributed;
mod embeddings;
#[path = "../distributed/exchange.rs"]
mod exchange;
mod finetune;
mod judging;
mod loss;
mod masks;
mod mixed_precision;
#[path = "../distributed/network.rs"]
mod network;
mod page;
mod recipes;
mod resume;
#[path = "../distributed/run.rs"]
mod run;
mod sam;
mod scores;
mod shards;
#[path = "../distributed/threads.rs"]
mod threads;
mod trainer;
