import dev.sigstore.AlgorithmRegistry.SigningAlgorithm;
import dev.sigstore.KeylessSigner;
import dev.sigstore.KeylessVerificationException;
import dev.sigstore.KeylessVerifier;
import dev.sigstore.SigningConfigProvider;
import dev.sigstore.TrustedRootProvider;
import dev.sigstore.VerificationOptions;
import dev.sigstore.VerificationOptions.CertificateMatcher;
import dev.sigstore.bundle.Bundle;
import dev.sigstore.oidc.client.OidcClients;
import dev.sigstore.oidc.client.TokenStringOidcClient;
import dev.sigstore.strings.StringMatcher;
import dev.sigstore.tuf.RootProvider;
import dev.sigstore.tuf.SigstoreTufClient;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;

/**
 * Signs and verifies with unmodified sigstore-java.
 *
 * <pre>
 * java Sigstore.java sign|attest   TRUST TOKEN_FILE FILE BUNDLE
 * java Sigstore.java verify        TRUST IDENTITY ISSUER FILE BUNDLE
 * </pre>
 *
 * TRUST is a folder with trusted_root.json and signing_config.v0.2.json, or the URL of a TUF
 * repository, a comma, the file of its first root, a comma, and a folder for the cache.
 */
class Sigstore {
  public static void main(String[] args) throws Exception {
    Trust trust = Trust.from(args[1]);
    switch (args[0]) {
      case "sign", "attest" -> sign(args[0], trust, Path.of(args[2]), Path.of(args[3]), Path.of(args[4]));
      case "verify" -> verify(trust, args[2], args[3], Path.of(args[4]), Path.of(args[5]));
      default -> throw new IllegalArgumentException(args[0]);
    }
  }

  private record Trust(TrustedRootProvider root, SigningConfigProvider config) {
    static Trust from(String where) throws Exception {
      String[] parts = where.split(",");
      if (parts.length == 1) {
        Path dir = Path.of(where);
        return new Trust(
            TrustedRootProvider.from(dir.resolve("trusted_root.json")),
            SigningConfigProvider.from(dir.resolve("signing_config.v0.2.json")));
      }
      SigstoreTufClient.Builder tuf =
          SigstoreTufClient.builder()
              .tufMirror(URI.create(parts[0]), RootProvider.fromFile(Path.of(parts[1])))
              .tufCacheLocation(Path.of(parts[2]));
      return new Trust(TrustedRootProvider.from(tuf), SigningConfigProvider.from(tuf));
    }
  }

  private static void sign(String how, Trust trust, Path token, Path file, Path out) throws Exception {
    try (KeylessSigner signer =
        KeylessSigner.builder()
            .trustedRootProvider(trust.root())
            .signingConfigProvider(trust.config())
            .forceCredentialProviders(OidcClients.of(TokenStringOidcClient.from(Files.readString(token).trim())))
            .signingAlgorithm(SigningAlgorithm.PKIX_ECDSA_P256_SHA_256)
            .enableRekorV2(true)
            .build()) {
      Bundle bundle = how.equals("sign") ? signer.signFile(file) : signer.attest(Files.readString(file));
      Files.writeString(out, bundle.toJson());
    }
  }

  private static void verify(Trust trust, String identity, String issuer, Path file, Path bundle) throws Exception {
    KeylessVerifier verifier = KeylessVerifier.builder().trustedRootProvider(trust.root()).build();
    VerificationOptions options =
        VerificationOptions.builder()
            .addCertificateMatchers(
                CertificateMatcher.fulcio()
                    .subjectAlternativeName(StringMatcher.string(identity))
                    .issuer(StringMatcher.string(issuer))
                    .build())
            .build();
    try {
      verifier.verify(file, Bundle.from(bundle, StandardCharsets.UTF_8), options);
    } catch (KeylessVerificationException refused) {
      System.out.println("refused: " + refused.getMessage());
      System.exit(3);
    }
    System.out.println("verified " + identity);
  }
}
