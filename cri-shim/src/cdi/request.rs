//! Which devices a container asks for.

use super::{CdiError, Name};
use crate::api;

/// Device plugins that predate the CRI's field ask by annotations with this prefix; the value is a
/// list with commas.
const ANNOTATION: &str = "cdi.k8s.io/";

/// The devices of a container, each once: the field's first, then the annotations' by their keys.
///
/// # Errors
/// [`CdiError::BadName`].
pub fn requested(config: &api::ContainerConfig) -> Result<Vec<Name>, CdiError> {
    let mut annotations: Vec<_> =
        config.annotations.iter().filter(|(key, _)| key.starts_with(ANNOTATION)).collect();
    annotations.sort();
    let field = config.cdi_devices.iter().map(|device| device.name.as_str());
    let listed = annotations.iter().flat_map(|(_, value)| value.split(','));
    let mut names: Vec<Name> = Vec::new();
    for text in field.chain(listed) {
        let name = text.parse()?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_and_annotations_are_joined() {
        let device = |name: &str| api::CdiDevice { name: name.to_owned() };
        let mut config = api::ContainerConfig {
            cdi_devices: vec![device("v/c=2"), device("v/c=1"), device("v/c=2")],
            annotations: [
                ("cdi.k8s.io/b_1", "v/c=4"),
                ("cdi.k8s.io/a_1", "v/c=1,v/c=3"),
                ("other", "rubbish"),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
            ..Default::default()
        };
        let names: Vec<String> =
            requested(&config).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(names, ["v/c=2", "v/c=1", "v/c=3", "v/c=4"]);
        config.annotations.insert("cdi.k8s.io/c".to_owned(), "v/c=1, v/c=5".to_owned());
        assert!(requested(&config).is_err());
    }
}
