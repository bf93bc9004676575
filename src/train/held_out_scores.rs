//! Scores of an evaluation: of the prompted objects, and of the masks found without a prompt.

use super::{MaskScores, ObjectScores};
use serde::Serialize;

const OBJECTS: usize = ObjectScores::NAMES.len();
const MASKS: usize = MaskScores::NAMES.len();

/// The scores of all held-out images.
///
/// [Example](crate::train::Schedule)
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct HeldOutScores {
    /// The means over the objects.
    #[serde(flatten)]
    pub objects: ObjectScores,
    /// Those of automatic masks, if some were made.
    #[serde(flatten)]
    pub masks: Option<MaskScores>,
}

impl From<ObjectScores> for HeldOutScores {
    fn from(objects: ObjectScores) -> Self {
        Self { objects, masks: None }
    }
}

impl HeldOutScores {
    /// How many measures there are.
    pub const COUNT: usize = OBJECTS + MASKS;

    /// The names of all measures.
    pub fn names() -> impl Iterator<Item = &'static str> {
        ObjectScores::NAMES.into_iter().chain(MaskScores::NAMES)
    }

    /// The measures in the order of [`names`](Self::names); none of masks that were not made.
    pub fn values(&self) -> [Option<f64>; Self::COUNT] {
        let mut values = [None; Self::COUNT];
        let masks = self.masks.iter().flat_map(MaskScores::values);
        values.iter_mut().zip(self.objects.values().into_iter().chain(masks)).for_each(
            |(place, value)| {
                *place = Some(value);
            },
        );
        values
    }

    /// From measures in the order of [`names`](Self::names).
    pub fn from_values(values: [Option<f64>; Self::COUNT]) -> Self {
        let (mut objects, mut masks) = ([0.0; OBJECTS], [0.0; MASKS]);
        objects.iter_mut().zip(&values).for_each(|(to, value)| *to = value.unwrap_or(0.0));
        let made = values[OBJECTS..].iter().all(Option::is_some);
        masks.iter_mut().zip(&values[OBJECTS..]).for_each(|(to, v)| *to = v.unwrap_or(0.0));
        Self {
            objects: ObjectScores::from_values(objects),
            masks: made.then(|| MaskScores::from_values(masks)),
        }
    }
}
