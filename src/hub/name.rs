//! Names on the Hugging Face hub: `owner/name` or `owner/name@revision`.

/// Repository and revision, of characters that mean nothing else in a path or an address.
pub(super) fn parse(name: &str) -> Option<(&str, &str)> {
    let (repository, revision) = name.split_once('@').unwrap_or((name, "main"));
    let (owner, model) = repository.split_once('/')?;
    // The cache writes `owner--name`.
    let valid = [owner, model].iter().all(|part| is_plain(part) && !part.contains("--"))
        && revision.split('/').all(is_plain);
    valid.then_some((repository, revision))
}

/// Whether this is one plain component of a path, on any system.
pub(super) fn is_plain(part: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty()
        && !part.starts_with(['.', '-'])
        && !part.ends_with('.')
        && part.chars().all(known)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn names_of_the_hub_are_told_from_paths() {
        assert_eq!(parse("facebook/sam-vit-base"), Some(("facebook/sam-vit-base", "main")));
        assert_eq!(parse("a/b_C.1@refs/pr/1"), Some(("a/b_C.1", "refs/pr/1")));
        for bad in [
            "",
            "sam",
            "/",
            "/a",
            "a/",
            "a/b/c",
            "/a/b",
            "./a",
            "../a",
            "a/..",
            "a/../b",
            "..a/b",
            "~/a",
            "-a/b",
            "a/b@",
            "a/b@..",
            "a/b@../c",
            "a/b@/c",
            "a/b@c/",
            "a/b@c//d",
            "a/b@c@d",
            "a\\b",
            "a/b\\c",
            "C:/a",
            "a/b?c",
            "a/b#c",
            "a/b%2e",
            "a/b c",
            "a--b/c",
            "a/\u{e9}",
            "https://huggingface.co/a/b",
            "a/b.",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
