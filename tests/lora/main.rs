//! Adapters as PEFT has them.

mod adapter;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod hotswap;
mod init;
mod injection;
mod merge;
mod modules_to_save;
mod several;
mod support;
mod targets;
mod weighted;
