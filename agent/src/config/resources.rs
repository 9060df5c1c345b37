//! What pods get of the machine: swap, and more to come with it. Pure.

use super::{ConfigError, KubeletConfiguration};

/// What pods get of the machine, as it was asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ResourceConfig {
    /// `memorySwap.swapBehavior: LimitedSwap`.
    pub limited_swap: bool,
    /// `failSwapOn: true`, written down: the default is not to mind.
    pub fail_swap_on: bool,
    /// `singleProcessOOMKill`; `None` is as the cgroups are: the whole container on v2.
    pub single_process_oom_kill: Option<bool>,
    /// `protectKernelDefaults`.
    pub protect_kernel_defaults: bool,
}

pub(super) fn resolve(kubelet: &KubeletConfiguration) -> Result<ResourceConfig, ConfigError> {
    let behavior = kubelet.memory_swap.as_ref().and_then(|swap| swap.swap_behavior.as_deref());
    Ok(ResourceConfig {
        limited_swap: match behavior.unwrap_or_default() {
            "" | "NoSwap" => false,
            "LimitedSwap" => true,
            other => {
                return Err(ConfigError::invalid(
                    "KubeletConfiguration.memorySwap.swapBehavior",
                    format!("{other:?} is unknown; use NoSwap or LimitedSwap"),
                ));
            }
        },
        fail_swap_on: kubelet.fail_swap_on == Some(true),
        single_process_oom_kill: kubelet.single_process_oom_kill,
        protect_kernel_defaults: kubelet.protect_kernel_defaults.unwrap_or(false),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<ResourceConfig, String> {
        resolve(&serde_json::from_str(text).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn swap_is_for_those_that_ask_for_it() {
        for (text, limited, fails) in [
            ("{}", false, false),
            (r#"{"memorySwap":{}}"#, false, false),
            (r#"{"memorySwap":{"swapBehavior":"NoSwap"},"failSwapOn":false}"#, false, false),
            (r#"{"memorySwap":{"swapBehavior":"LimitedSwap"}}"#, true, false),
            (r#"{"failSwapOn":true}"#, false, true),
        ] {
            let config = of(text).unwrap();
            assert_eq!((config.limited_swap, config.fail_swap_on), (limited, fails), "{text}");
        }
        let error = of(r#"{"memorySwap":{"swapBehavior":"UnlimitedSwap"}}"#).unwrap_err();
        assert!(error.contains("memorySwap.swapBehavior: \"UnlimitedSwap\" is unknown"), "{error}");
    }
}
