//! The documents for users, one page each, their code compiled and run by `cargo test`.
//!
//! # In the repository alone
//!
//! Measurements (`docs/performance.md`, `docs/log`), the pages for contributors (`docs/kernels.md`,
//! `docs/emulator.md`), the shipped model, the photographs and the jobs for clusters are files of the repository.

/// A module a document. The first definition of a link's label counts, so the file of links comes first. Then a label
/// that leads to a file in the repository leads to a page here.
macro_rules! guides {
    ($($name:ident $file:literal)*) => {$(
        #[doc = include_str!("guide_links.md")]
        #[doc = include_str!(concat!("../docs/", $file))]
        pub mod $name {}
    )*

    #[cfg(test)]
    const DOCUMENTS: &[(&str, &str)] = &[
        ("README.md", include_str!("../README.md")),
        $(($file, include_str!(concat!("../docs/", $file)))),*
    ];};
}

guides! {
    any_model "any-model.md"
    clusters "clusters.md"
    correctness "correctness.md"
    cuda "cuda.md"
    data "data.md"
    distributed "distributed.md"
    everything "everything.md"
    failures "failures.md"
    gradients "gradients.md"
    hack_your_own "hack-your-own.md"
    int8 "int8.md"
    library "library.md"
    link "link.md"
    parameter_counts "parameter-counts.md"
    peft "peft.md"
    program "program.md"
    reliability "reliability.md"
    training "training.md"
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// The labels that a text defines, `[label]: target`.
    fn labels(text: &str) -> BTreeSet<&str> {
        text.lines().filter_map(|line| Some(line.strip_prefix('[')?.split_once("]: ")?.0)).collect()
    }

    #[test]
    fn links_between_documents_are_labels_with_a_page() {
        let pages = labels(include_str!("guide_links.md"));
        for (file, text) in super::DOCUMENTS {
            let lost: Vec<_> = labels(text).difference(&pages).copied().collect();
            assert!(lost.is_empty(), "{file}: src/guide_links.md lacks {lost:?}");
            let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
            for target in targets.filter(|target| target.contains(".md")) {
                assert!(target.starts_with("http"), "{file}: make a label of the link to {target}");
            }
        }
    }
}
