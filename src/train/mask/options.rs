//! Options for reading masks.

use serde::Serialize;

/// How masks are read. The default decides by what the masks hold.
///
/// [Example](crate::train::interpret)
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MaskOptions {
    /// Values that are neither object nor background; without it they are told by the rules.
    pub ignore: Option<Vec<i64>>,
    /// The value of the background.
    pub background: Option<i64>,
    /// Whether each connected part of each value is an object: for masks of classes.
    pub parts: bool,
    /// The page of a file that has several, from 1.
    pub page: Option<usize>,
}

impl MaskOptions {
    /// A value as users write it: a number, or a colour, `#rrggbb`.
    ///
    /// # Errors
    /// - the text is neither.
    pub fn parse_value(text: &str) -> Result<i64, String> {
        let text = text.trim();
        let colour = || {
            let digits = text.strip_prefix('#').filter(|digits| digits.len() == 6)?;
            i64::from_str_radix(digits, 16).ok()
        };
        text.parse()
            .ok()
            .or_else(colour)
            .ok_or(format!("expected a whole number or a colour as #rrggbb, got {text:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::MaskOptions;

    #[test]
    fn values_are_numbers_or_colours() {
        for (text, value) in [("255", 255), ("-1", -1), ("#ffffff", 0xff_ffff), ("#0000FF", 255)] {
            assert_eq!(MaskOptions::parse_value(text), Ok(value));
        }
        for text in ["", "white", "#fff", "1.5"] {
            assert!(MaskOptions::parse_value(text).is_err(), "{text}");
        }
    }
}
