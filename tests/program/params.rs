//! `params`.

use super::{fail, succeed};
use anyhow::{ensure, Result};

/// The numbers are those of `print_trainable_parameters` in PEFT: tests/fixtures/counts.json.
#[test]
fn counts_what_peft_counts() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    for (command, expected) in [
        ("", "trainable params: 589,824 || all params: 94,325,296 || trainable%: 0.6253\n"),
        (
            "--r 16 --target-modules q,v --use-dora",
            "trainable params: 608,256 || all params: 94,343,728 || trainable%: 0.6447\n",
        ),
    ] {
        let out = succeed(here, "params", command)?;
        ensure!(out == expected, "params {command}: {out}");
    }
    Ok(())
}

#[test]
fn says_what_is_wrong() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let fails = |command: &str, code, words: &[&str]| fail(here, "params", command, code, words);
    fails("--config vit_x", 1, &["error: ", "vit_x", "vit_b, vit_l, vit_h or a config.json"])?;
    fails("--r 0", 1, &["error: ", "rank", "got 0"])?;
    fails("--target-modules qq", 1, &["error: ", "matches no layer", "k_proj"])?;
    fails("--r many", 2, &["many", "--r"])?;
    fails("--ranks 3", 2, &["--ranks"])
}
