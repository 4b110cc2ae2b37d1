package profile

import (
	"fmt"

	"github.com/zmap/zlint/v3/lint"
)

// aboutExtension names, by the extension's object identifier, the lints that
// apply only to a certificate that has the extension: their CheckApplies asks
// for it, or for CA:TRUE, which is in basic constraints. To ask a lint costs
// more than to look, and a leaf has none of these extensions; so they are not
// asked when it is absent. A certificate that has one is held to all of them.
//
// A name that the registry does not know stops the start. A test asks them all
// about certificates without the extension.
var aboutExtension = map[string][]string{
	"1.3.6.1.5.5.7.1.1": { // authority information access
		"e_ext_aia_marked_critical",
		"w_ext_aia_access_location_missing",
	},
	"1.3.6.1.5.5.7.1.11": { // subject information access
		"e_subject_info_access_marked_critical",
	},
	"2.5.29.18": { // issuer alternative name
		"e_ext_ian_dns_not_ia5_string",
		"e_ext_ian_empty_name",
		"e_ext_ian_no_entries",
		"e_ext_ian_rfc822_format_invalid",
		"e_ext_ian_space_dns_name",
		"e_ext_ian_uri_format_invalid",
		"e_ext_ian_uri_host_not_fqdn_or_ip",
		"e_ext_ian_uri_not_ia5",
		"e_ext_ian_uri_relative",
		"e_ian_bare_wildcard",
		"e_ian_dns_name_includes_null_char",
		"e_ian_dns_name_starts_with_period",
		"e_ian_wildcard_not_first",
		"w_ext_ian_critical",
		"w_ian_iana_pub_suffix_empty",
	},
	"2.5.29.19": { // basic constraints
		"e_basic_constr_invalid_der",
		"e_basic_constraints_not_critical",
		"e_ca_subject_field_empty",
		"e_ext_subject_key_identifier_missing_ca",
		"e_path_len_constraint_improperly_included",
		"e_path_len_constraint_zero_or_less",
		"e_rsa_allowed_ku_ca",
		"e_rsa_allowed_ku_no_encipherment_ca",
	},
	"2.5.29.30": { // name constraints
		"e_ext_name_constraints_not_critical",
		"e_ext_name_constraints_not_in_ca",
		"e_name_constraint_empty",
		"e_name_constraint_maximum_not_absent",
		"e_name_constraint_minimum_non_zero",
		"e_name_constraint_not_fqdn",
		"w_name_constraint_on_edi_party_name",
		"w_name_constraint_on_registered_id",
		"w_name_constraint_on_x400",
	},
	"2.5.29.31": { // CRL distribution points
		"e_distribution_point_incomplete",
		"w_distribution_point_missing_ldap_or_uri",
		"w_ext_crl_distribution_marked_critical",
	},
	"2.5.29.32": { // certificate policies
		"e_ext_cert_policy_disallowed_any_policy_qualifier",
		"e_ext_cert_policy_duplicate",
		"w_ext_cert_policy_contains_noticeref",
	},
	"2.5.29.33": { // policy mappings
		"e_ext_policy_map_any_policy",
		"w_ext_policy_map_not_critical",
		"w_ext_policy_map_not_in_cert_policy",
	},
	"2.5.29.36": { // policy constraints
		"e_ext_policy_constraints_empty",
		"e_ext_policy_constraints_not_critical",
	},
	"2.5.29.46": { // freshest CRL
		"e_ext_freshest_crl_marked_critical",
	},
	"2.5.29.54": { // inhibit anyPolicy
		"e_inhibit_any_policy_not_critical",
	},
	"2.5.29.9": { // subject directory attributes
		"e_ext_subject_directory_attr_critical",
	},
}

// needs turns aboutExtension around: lint to extension.
func needs(lints lint.CertificateLinterLookup) (map[string]string, error) {
	out := make(map[string]string)
	for id, names := range aboutExtension {
		for _, name := range names {
			if lints.ByName(name) == nil {
				return nil, fmt.Errorf("extension %s: %s names no lint of the registry", id, name)
			}
			out[name] = id
		}
	}
	return out, nil
}
