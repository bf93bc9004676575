//! The fields of a configuration set one after another: `LoraConfig::new(8).alpha(16.0).target_modules(["q", "v"])`.

use super::{BiasTraining, InitLoraWeights, LoraConfig, ModuleNames, ValueOrList};

impl LoraConfig {
    /// Sets `lora_alpha`.
    pub fn alpha(self, alpha: f64) -> Self {
        Self { alpha, ..self }
    }

    /// Sets `lora_dropout`.
    pub fn dropout(self, dropout: f64) -> Self {
        Self { dropout, ..self }
    }

    /// Targets the linear layers with one of these names.
    pub fn target_modules<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().map(Into::into).collect();
        Self { target_modules: Some(ModuleNames::List(names)), ..self }
    }

    /// Targets the linear layers whose whole path matches this regular expression.
    pub fn target_regex(self, pattern: impl Into<String>) -> Self {
        Self { target_modules: Some(ModuleNames::Regex(pattern.into())), ..self }
    }

    /// Leaves out modules with one of these names.
    pub fn exclude_modules<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().map(Into::into).collect();
        Self { exclude_modules: Some(ModuleNames::List(names)), ..self }
    }

    /// Adapts only the blocks with these indices.
    pub fn layers_to_transform(self, indices: impl IntoIterator<Item = i64>) -> Self {
        let indices = indices.into_iter().collect();
        Self { layers_to_transform: Some(ValueOrList::List(indices)), ..self }
    }

    /// Names what stands before the index of a block.
    pub fn layers_pattern<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().map(Into::into).collect();
        Self { layers_pattern: Some(ValueOrList::List(names)), ..self }
    }

    /// Trains and saves these modules whole.
    pub fn modules_to_save<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        Self { modules_to_save: Some(names.into_iter().map(Into::into).collect()), ..self }
    }

    /// Chooses which base biases are trained.
    pub fn bias(self, bias: BiasTraining) -> Self {
        Self { bias, ..self }
    }

    /// Chooses the initialisation by its name, as "pissa".
    pub fn init(self, name: impl Into<String>) -> Self {
        Self { init_lora_weights: InitLoraWeights::Named(name.into()), ..self }
    }

    /// Turns on rank stabilisation.
    pub fn rslora(self) -> Self {
        Self { use_rslora: true, ..self }
    }

    /// Turns on DoRA.
    pub fn dora(self) -> Self {
        Self { use_dora: true, ..self }
    }

    /// Gives B a bias.
    pub fn lora_bias(self) -> Self {
        Self { lora_bias: true, ..self }
    }

    /// Gives modules that match `pattern` a rank of their own.
    pub fn rank_of(mut self, pattern: impl Into<String>, rank: usize) -> Self {
        self.rank_pattern.insert(pattern.into(), rank);
        self
    }

    /// Gives modules that match `pattern` an alpha of their own.
    pub fn alpha_of(mut self, pattern: impl Into<String>, alpha: f64) -> Self {
        self.alpha_pattern.insert(pattern.into(), alpha);
        self
    }
}
